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

static inline int not_ternary(const uint8_t *restrict c, int64_t n) {
    uint8_t worst = 0;
    for (int64_t i = 0; i < n; i++) worst = larger(worst, (uint8_t)(c[i] + 1));
    return worst > 2;
}

/* --- Two bits --- */

static inline uint8_t four_to_byte(uint8_t c0, uint8_t c1, uint8_t c2, uint8_t c3) {
    return (uint8_t)(c0 + 4 * (uint8_t)(c1 + 4 * (uint8_t)(c2 + 4 * c3)) + 0x55);
}

static inline int8_t field(uint8_t byte, int shift) { return (int8_t)((byte >> shift & 3) - 1); }

/* Byte p of 32 holds the codes p, p + 32, p + 64, p + 96, the first in the lowest bits. */
static inline void pack_line(const uint8_t *restrict c, uint8_t *restrict out) {
    for (int p = 0; p < 32; p++) out[p] = four_to_byte(c[p], c[p + 32], c[p + 64], c[p + 96]);
}

static inline uint8_t unpack_line(const uint8_t *restrict in, int8_t *restrict c, int first_shift) {
    uint8_t threes = 0;
    for (int p = 0; p < 32; p++) {
        threes |= in[p] & in[p] >> 1 & 0x55;
        c[p] = field(in[p], first_shift);
        c[p + 32] = field(in[p], first_shift ? 4 : 2);
        c[p + 64] = field(in[p], first_shift ? 2 : 4);
        c[p + 96] = field(in[p], first_shift ? 0 : 6);
    }
    return threes;
}

/* Columns of four row quarters. */
void pack_two_bit(const Launch *a, int64_t row, float *restrict scratch) {
    (void)scratch;
    int64_t n = a->columns, quarter = a->rows * n;
    const uint8_t *restrict c0 = (const uint8_t *)a->codes + row * n, *c1 = c0 + quarter;
    const uint8_t *restrict c2 = c1 + quarter, *c3 = c2 + quarter;
    uint8_t *restrict out = (uint8_t *)a->out.data + row * n, worst = 0;
    for (int64_t i = 0; i < n; i++) {
        out[i] = four_to_byte(c0[i], c1[i], c2[i], c3[i]);
        worst = larger(worst, larger(larger((uint8_t)(c0[i] + 1), (uint8_t)(c1[i] + 1)),
                                     larger((uint8_t)(c2[i] + 1), (uint8_t)(c3[i] + 1))));
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
        threes |= in[i] & in[i] >> 1 & 0x55;
        c0[i] = field(in[i], 0);
        c1[i] = field(in[i], 2);
        c2[i] = field(in[i], 4);
        c3[i] = field(in[i], 6);
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

/* Runs of `width` codes to as many bytes; run i of five begins at c + i stride. */
static inline void pack_five(const uint8_t *restrict c, int64_t stride, int64_t width,
                             uint8_t *restrict out) {
    for (int64_t i = 0; i < width; i++) {
        uint8_t v = 3 * (uint8_t)(3 * c[i] + c[i + stride]) + c[i + 2 * stride];
        v = 3 * (uint8_t)(3 * v + c[i + 3 * stride]) + c[i + 4 * stride];
        out[i] = to_fraction((uint8_t)(v + 81 + 27 + 9 + 3 + 1)); /* a trit is its code + 1 */
    }
}

static inline void unpack_five(const uint8_t *restrict in, int64_t width, int8_t *restrict c,
                               int64_t stride) {
    for (int64_t i = 0; i < width; i++) {
        uint8_t q = in[i], q1 = 3 * q, q2 = 3 * q1, q3 = 3 * q2, q4 = 3 * q3;
        c[i] = (int8_t)(trit(q) - 1);
        c[i + stride] = (int8_t)(trit(q1) - 1);
        c[i + 2 * stride] = (int8_t)(trit(q2) - 1);
        c[i + 3 * stride] = (int8_t)(trit(q3) - 1);
        c[i + 4 * stride] = (int8_t)(trit(q4) - 1);
    }
}

/* Byte j of a row of `first` holds the codes j + i first; those beyond the row are 0. */
void pack_base3(const Launch *a, int64_t row, float *restrict scratch) {
    (void)scratch;
    int64_t n = a->columns, width = a->first, full = n - 4 * width > 0 ? n - 4 * width : 0;
    const uint8_t *restrict c = (const uint8_t *)a->codes + row * n;
    uint8_t *restrict out = (uint8_t *)a->out.data + row * width;
    pack_five(c, width, full, out);
    for (int64_t j = full; j < width; j++) {
        uint8_t v = 0;
        for (int64_t i = 0; i < 5; i++)
            v = (uint8_t)(3 * v + (j + i * width < n ? c[j + i * width] : 0) + 1);
        out[j] = to_fraction(v);
    }
    note(a, not_ternary(c, n));
}

void unpack_base3(const Launch *a, int64_t row, float *restrict scratch) {
    (void)scratch;
    int64_t n = a->columns, width = a->first, full = n - 4 * width > 0 ? n - 4 * width : 0;
    const uint8_t *restrict in = (const uint8_t *)a->out.data + row * width;
    int8_t *restrict c = a->codes + row * n;
    uint8_t invalid = 0;
    for (int64_t j = 0; j < width; j++) invalid |= is_no_fraction(in[j]);
    unpack_five(in, full, c, width);
    for (int64_t j = full; j < width; j++) {
        uint8_t q = in[j];
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
static inline void store_scale(const Launch *a, const uint8_t *restrict c, uint8_t *restrict out) {
    uint8_t any = 0;
    for (int i = 0; i < GROUP; i++) any |= c[i];
    uint16_t d = any ? to_fp16(*a->scale) : 0;
    memcpy(out, &d, sizeof d);
}

static inline void load_scale(const Launch *a, int64_t group, const uint8_t *restrict in) {
    memcpy((uint16_t *)a->other.data + group, in, sizeof(uint16_t));
}

void pack_tq2_0(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * GROUPS_PER_BLOCK, end = end_of(a, first, GROUPS_PER_BLOCK);
    const uint8_t *codes = (const uint8_t *)a->codes;
    for (int64_t group = first; group < end; group++) {
        const uint8_t *c = codes + group * GROUP;
        uint8_t *out = (uint8_t *)a->out.data + group * TQ2;
        pack_line(c, out);
        pack_line(c + LINE, out + 32);
        store_scale(a, c, out + 64);
    }
    note(a, not_ternary(codes + first * GROUP, (end - first) * GROUP));
}

void unpack_tq2_0(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * GROUPS_PER_BLOCK, end = end_of(a, first, GROUPS_PER_BLOCK);
    uint8_t threes = 0;
    for (int64_t group = first; group < end; group++) {
        const uint8_t *in = (const uint8_t *)a->out.data + group * TQ2;
        threes |= unpack_line(in, a->codes + group * GROUP, 0);
        threes |= unpack_line(in + 32, a->codes + group * GROUP + LINE, 0);
        load_scale(a, group, in + 64);
    }
    note(a, threes);
}

/* Of each 16 codes that four bytes hold, those of byte j are j, j + 4, ...; the fifth trit is 0. */
static inline void pack_last(const uint8_t *restrict c, uint8_t *restrict out) {
    for (int j = 0; j < 4; j++) {
        uint8_t v = 27 * c[j] + 9 * c[j + 4] + 3 * c[j + 8] + c[j + 12] + 27 + 9 + 3 + 1;
        out[j] = to_fraction((uint8_t)(3 * v));
    }
}

static inline uint8_t unpack_last(const uint8_t *restrict in, int8_t *restrict c) {
    uint8_t fifth[4];
    for (int j = 0; j < 4; j++) {
        uint8_t q = in[j], q1 = 3 * q, q2 = 3 * q1, q3 = 3 * q2;
        c[j] = (int8_t)(trit(q) - 1);
        c[j + 4] = (int8_t)(trit(q1) - 1);
        c[j + 8] = (int8_t)(trit(q2) - 1);
        c[j + 12] = (int8_t)(trit(q3) - 1);
        fifth[j] = trit(3 * q3);
    }
    return fifth[0] | fifth[1] | fifth[2] | fifth[3];
}

void pack_tq1_0(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * GROUPS_PER_BLOCK, end = end_of(a, first, GROUPS_PER_BLOCK);
    const uint8_t *codes = (const uint8_t *)a->codes;
    for (int64_t group = first; group < end; group++) {
        const uint8_t *c = codes + group * GROUP;
        uint8_t *out = (uint8_t *)a->out.data + group * TQ1;
        pack_five(c, 32, 32, out);
        pack_five(c + 160, 16, 16, out + 32);
        pack_last(c + 240, out + 48);
        store_scale(a, c, out + 52);
    }
    note(a, not_ternary(codes + first * GROUP, (end - first) * GROUP));
}

void unpack_tq1_0(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * GROUPS_PER_BLOCK, end = end_of(a, first, GROUPS_PER_BLOCK);
    uint8_t invalid[32] = {0}, any = 0;
    for (int64_t group = first; group < end; group++) {
        const uint8_t *in = (const uint8_t *)a->out.data + group * TQ1;
        int8_t *c = a->codes + group * GROUP;
        for (int i = 0; i < 32; i++) invalid[i] |= is_no_fraction(in[i]);
        for (int i = 0; i < 16; i++) invalid[i] |= is_no_fraction(in[32 + i]);
        for (int i = 0; i < 4; i++) invalid[i] |= is_no_fraction(in[48 + i]);
        unpack_five(in, 32, c, 32);
        unpack_five(in + 32, 16, c + 160, 16);
        any |= unpack_last(in + 48, c + 240);
        load_scale(a, group, in + 52);
    }
    for (int i = 0; i < 32; i++) any |= invalid[i];
    note(a, any);
}

/* --- I2_S: the first code of a byte in the highest bits --- */

void pack_i2_s(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * LINES_PER_BLOCK, end = end_of(a, first, LINES_PER_BLOCK);
    const uint8_t *codes = (const uint8_t *)a->codes;
    for (int64_t line = first; line < end; line++) {
        const uint8_t *restrict c = codes + line * LINE;
        uint8_t *restrict out = (uint8_t *)a->out.data + line * (LINE / 4);
        for (int p = 0; p < 32; p++) out[p] = four_to_byte(c[p + 96], c[p + 64], c[p + 32], c[p]);
    }
    note(a, not_ternary(codes + first * LINE, (end - first) * LINE));
}

void unpack_i2_s(const Launch *a, int64_t block, float *restrict scratch) {
    (void)scratch;
    int64_t first = block * LINES_PER_BLOCK, end = end_of(a, first, LINES_PER_BLOCK);
    uint8_t threes = 0;
    for (int64_t line = first; line < end; line++) {
        const uint8_t *in = (const uint8_t *)a->out.data + line * (LINE / 4);
        threes |= unpack_line(in, a->codes + line * LINE, 6);
    }
    note(a, threes);
}
