/* Ternary codes to bytes and back: pack.py and gguf_blocks.py say the layouts and are the
specification.

`codes` holds the int8 codes and `out.data` the bytes, also when those are what is read. A value
that no layout holds sets sums[0]; what is written for it means nothing. Loops count up to a
constant or over whole rows, in bytes: compilers turn them into vectors of 64. */

#include "cpu.h"

enum { GROUP = 256, GROUPS_PER_BLOCK = 64, TQ1 = 54, TQ2 = 66, LINE = 128, LINES_PER_BLOCK = 128 };

static inline void note(const Launch *a, int invalid) {
    if (invalid) __atomic_store_n(a->sums, 1, __ATOMIC_RELAXED);
}

static inline uint8_t larger(uint8_t x, uint8_t y) { return x > y ? x : y; }

/* --- Two bits: columns of four row quarters --- */

void pack_two_bit(const Launch *a, int64_t row, float *restrict scratch) {
    (void)scratch;
    int64_t n = a->columns, quarter = a->rows * n;
    const uint8_t *restrict c0 = (const uint8_t *)a->codes + row * n, *c1 = c0 + quarter;
    const uint8_t *restrict c2 = c1 + quarter, *c3 = c2 + quarter;
    uint8_t *restrict out = (uint8_t *)a->out.data + row * n, worst = 0;
    for (int64_t i = 0; i < n; i++) {
        uint8_t q0 = c0[i] + 1, q1 = c1[i] + 1, q2 = c2[i] + 1, q3 = c3[i] + 1;
        worst = larger(worst, larger(larger(q0, q1), larger(q2, q3)));
        out[i] = q0 + 4 * (uint8_t)(q1 + 4 * (uint8_t)(q2 + 4 * q3));
    }
    note(a, worst > 2);
}

void unpack_two_bit(const Launch *a, int64_t row, float *restrict scratch) {
    (void)scratch;
    int64_t n = a->columns, quarter = a->rows * n;
    const uint8_t *restrict in = (const uint8_t *)a->out.data + row * n;
    int8_t *restrict c0 = a->codes + row * n, *restrict c1 = c0 + quarter;
    int8_t *restrict c2 = c1 + quarter, *restrict c3 = c2 + quarter;
    uint8_t threes = 0;
    for (int64_t i = 0; i < n; i++) {
        uint8_t b = in[i];
        threes |= b & b >> 1 & 0x55;
        c0[i] = (int8_t)((b & 3) - 1);
        c1[i] = (int8_t)((b >> 2 & 3) - 1);
        c2[i] = (int8_t)((b >> 4 & 3) - 1);
        c3[i] = (int8_t)((b >> 6) - 1);
    }
    note(a, threes);
}

/* --- Base 3: five trits v = Σ 3^(4−i) t_i in the byte ceil(256 v / 243) --- */

static inline uint8_t to_fraction(uint8_t v) {
    uint16_t rounded_up = (uint16_t)(v * 256 + 242);
    return (uint8_t)(rounded_up / 243);
}

/* The digit before the point of 3 q / 256. */
static inline uint8_t trit(uint8_t q) { return (uint8_t)((q >= 86) + (q >= 171)); }

/* Whether no v gives the byte: 243 q = 256 v + r has then r >= 243. */
static inline uint8_t is_no_fraction(uint8_t q) { return (uint8_t)(q * 243) >= 243; }

/* Five runs of `width` trits to as many bytes; trits of run i begin at c + i stride. */
static inline uint8_t pack_five(const uint8_t *restrict c, int64_t stride, int64_t width,
                                uint8_t *restrict out) {
    uint8_t worst = 0;
    for (int64_t i = 0; i < width; i++) {
        uint8_t q0 = c[i] + 1, q1 = c[i + stride] + 1, q2 = c[i + 2 * stride] + 1;
        uint8_t q3 = c[i + 3 * stride] + 1, q4 = c[i + 4 * stride] + 1;
        worst = larger(larger(worst, q0), larger(larger(q1, q2), larger(q3, q4)));
        uint8_t v = 3 * (uint8_t)(3 * (uint8_t)(3 * (uint8_t)(3 * q0 + q1) + q2) + q3) + q4;
        out[i] = to_fraction(v);
    }
    return worst;
}

static inline uint8_t unpack_five(const uint8_t *restrict in, int64_t width, int8_t *restrict c,
                                  int64_t stride) {
    uint8_t invalid = 0;
    for (int64_t i = 0; i < width; i++) {
        uint8_t q = in[i], q1 = 3 * q, q2 = 3 * q1, q3 = 3 * q2, q4 = 3 * q3;
        invalid |= is_no_fraction(q);
        c[i] = (int8_t)(trit(q) - 1);
        c[i + stride] = (int8_t)(trit(q1) - 1);
        c[i + 2 * stride] = (int8_t)(trit(q2) - 1);
        c[i + 3 * stride] = (int8_t)(trit(q3) - 1);
        c[i + 4 * stride] = (int8_t)(trit(q4) - 1);
    }
    return invalid;
}

/* Byte j of a row of `first` holds the codes j + i first; those beyond the row are 0. */
void pack_base3(const Launch *a, int64_t row, float *restrict scratch) {
    (void)scratch;
    int64_t n = a->columns, width = a->first, full = n - 4 * width > 0 ? n - 4 * width : 0;
    const uint8_t *restrict c = (const uint8_t *)a->codes + row * n;
    uint8_t *restrict out = (uint8_t *)a->out.data + row * width;
    uint8_t worst = pack_five(c, width, full, out);
    for (int64_t j = full; j < width; j++) {
        uint8_t v = 0;
        for (int64_t i = 0; i < 5; i++) {
            uint8_t q = j + i * width < n ? (uint8_t)(c[j + i * width] + 1) : 1;
            worst = larger(worst, q);
            v = (uint8_t)(3 * v + q);
        }
        out[j] = to_fraction(v);
    }
    note(a, worst > 2);
}

void unpack_base3(const Launch *a, int64_t row, float *restrict scratch) {
    (void)scratch;
    int64_t n = a->columns, width = a->first, full = n - 4 * width > 0 ? n - 4 * width : 0;
    const uint8_t *restrict in = (const uint8_t *)a->out.data + row * width;
    int8_t *restrict c = a->codes + row * n;
    uint8_t invalid = unpack_five(in, full, c, width);
    for (int64_t j = full; j < width; j++) {
        uint8_t q = in[j];
        invalid |= is_no_fraction(q);
        for (int64_t i = 0; i < 5; i++, q = (uint8_t)(3 * q)) {
            if (j + i * width < n) c[j + i * width] = (int8_t)(trit(q) - 1);
            else invalid |= trit(q) != 1;
        }
    }
    note(a, invalid);
}

/* --- Groups of 256, as GGUF stores them --- */

static inline int64_t end_of(const Launch *a, int64_t first, int64_t size) {
    return first + size < a->rows ? first + size : a->rows;
}

/* scale, or 0 if every code is: what the maximum of the group is. */
static inline void store_scale(const Launch *a, const int8_t *restrict c, uint8_t *restrict out) {
    uint8_t any = 0;
    for (int i = 0; i < GROUP; i++) any |= (uint8_t)c[i];
    uint16_t d = any ? to_fp16(*a->scale) : 0;
    memcpy(out, &d, sizeof d);
}

static inline void load_scale(const Launch *a, int64_t group, const uint8_t *restrict in) {
    memcpy((uint16_t *)a->other.data + group, in, sizeof(uint16_t));
}

void pack_tq2_0(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * GROUPS_PER_BLOCK, end = end_of(a, first, GROUPS_PER_BLOCK);
    uint8_t worst = 0;
    for (int64_t group = first; group < end; group++) {
        const int8_t *restrict c = a->codes + group * GROUP;
        uint8_t *restrict out = (uint8_t *)a->out.data + group * TQ2;
        for (int half = 0; half < 2; half++) {
            const uint8_t *restrict q = (const uint8_t *)c + 128 * half;
            for (int i = 0; i < 32; i++) {
                uint8_t q0 = q[i] + 1, q1 = q[i + 32] + 1, q2 = q[i + 64] + 1, q3 = q[i + 96] + 1;
                worst = larger(worst, larger(larger(q0, q1), larger(q2, q3)));
                out[32 * half + i] = q0 + 4 * (uint8_t)(q1 + 4 * (uint8_t)(q2 + 4 * q3));
            }
        }
        store_scale(a, c, out + 64);
    }
    note(a, worst > 2);
}

void unpack_tq2_0(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * GROUPS_PER_BLOCK, end = end_of(a, first, GROUPS_PER_BLOCK);
    uint8_t threes = 0;
    for (int64_t group = first; group < end; group++) {
        const uint8_t *restrict in = (const uint8_t *)a->out.data + group * TQ2;
        for (int half = 0; half < 2; half++) {
            int8_t *restrict c = a->codes + group * GROUP + 128 * half;
            for (int i = 0; i < 32; i++) {
                uint8_t b = in[32 * half + i];
                threes |= b & b >> 1 & 0x55;
                c[i] = (int8_t)((b & 3) - 1);
                c[i + 32] = (int8_t)((b >> 2 & 3) - 1);
                c[i + 64] = (int8_t)((b >> 4 & 3) - 1);
                c[i + 96] = (int8_t)((b >> 6) - 1);
            }
        }
        load_scale(a, group, in + 64);
    }
    note(a, threes);
}

void pack_tq1_0(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * GROUPS_PER_BLOCK, end = end_of(a, first, GROUPS_PER_BLOCK);
    uint8_t worst = 0;
    for (int64_t group = first; group < end; group++) {
        const int8_t *codes = a->codes + group * GROUP;
        const uint8_t *restrict c = (const uint8_t *)codes;
        uint8_t *restrict out = (uint8_t *)a->out.data + group * TQ1;
        worst = larger(worst, pack_five(c, 32, 32, out));
        worst = larger(worst, pack_five(c + 160, 16, 16, out + 32));
        for (int j = 0; j < 4; j++) {
            uint8_t v = 0;
            for (int m = 0; m < 4; m++) {
                uint8_t q = c[240 + j + 4 * m] + 1;
                worst = larger(worst, q);
                v = (uint8_t)(3 * v + q);
            }
            out[48 + j] = to_fraction((uint8_t)(3 * v));
        }
        store_scale(a, codes, out + 52);
    }
    note(a, worst > 2);
}

void unpack_tq1_0(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * GROUPS_PER_BLOCK, end = end_of(a, first, GROUPS_PER_BLOCK);
    uint8_t invalid = 0;
    for (int64_t group = first; group < end; group++) {
        const uint8_t *restrict in = (const uint8_t *)a->out.data + group * TQ1;
        int8_t *restrict c = a->codes + group * GROUP;
        invalid |= unpack_five(in, 32, c, 32);
        invalid |= unpack_five(in + 32, 16, c + 160, 16);
        for (int j = 0; j < 4; j++) {
            uint8_t q = in[48 + j];
            invalid |= is_no_fraction(q);
            for (int m = 0; m < 4; m++, q = (uint8_t)(3 * q))
                c[240 + j + 4 * m] = (int8_t)(trit(q) - 1);
            invalid |= trit(q); /* the fifth */
        }
        load_scale(a, group, in + 52);
    }
    note(a, invalid);
}

/* --- I2_S: lines of 128 codes in 32 bytes --- */

void pack_i2_s(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * LINES_PER_BLOCK, end = end_of(a, first, LINES_PER_BLOCK);
    uint8_t worst = 0;
    for (int64_t line = first; line < end; line++) {
        const uint8_t *restrict c = (const uint8_t *)a->codes + line * LINE;
        uint8_t *restrict out = (uint8_t *)a->out.data + line * (LINE / 4);
        for (int i = 0; i < 32; i++) {
            uint8_t q0 = c[i] + 1, q1 = c[i + 32] + 1, q2 = c[i + 64] + 1, q3 = c[i + 96] + 1;
            worst = larger(worst, larger(larger(q0, q1), larger(q2, q3)));
            out[i] = q3 + 4 * (uint8_t)(q2 + 4 * (uint8_t)(q1 + 4 * q0));
        }
    }
    note(a, worst > 2);
}

void unpack_i2_s(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * LINES_PER_BLOCK, end = end_of(a, first, LINES_PER_BLOCK);
    uint8_t threes = 0;
    for (int64_t line = first; line < end; line++) {
        const uint8_t *restrict in = (const uint8_t *)a->out.data + line * (LINE / 4);
        int8_t *restrict c = a->codes + line * LINE;
        for (int i = 0; i < 32; i++) {
            uint8_t b = in[i];
            threes |= b & b >> 1 & 0x55;
            c[i] = (int8_t)((b >> 6) - 1);
            c[i + 32] = (int8_t)((b >> 4 & 3) - 1);
            c[i + 64] = (int8_t)((b >> 2 & 3) - 1);
            c[i + 96] = (int8_t)((b & 3) - 1);
        }
    }
    note(a, threes);
}
