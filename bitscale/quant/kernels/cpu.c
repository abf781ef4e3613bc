/* The elementwise work of the b158 quantizer on a CPU. Matrix products are torch's: cpu_gemm.py.

A kernel is a function of (launch, block): block is a row of a matrix, or so many elements of a
weight; which fields of the launch it uses says its comment. cpu_library.py compiles this file
when it is first needed and mirrors `Launch`. Plain C of gcc and clang, without headers of torch.

Shapes: T tokens, D inputs, F outputs, N = F·D weights. The specification of every formula is
plain.py and plain_backward.py. Compiled without -ffast-math and with -ffp-contract=off: a result
that plain.py rounds is rounded here too, so that codes are equal bit for bit. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FP32, BF16, FP16 };
enum { WEIGHTS_PER_BLOCK = 16384, TILE = 2048, STRIPE = 64, BINS = 65536, LANES = 16 };

typedef struct {
    void *data;
    int64_t stride; /* of a row, in elements; those of a row are contiguous */
    int64_t dtype;
} Matrix;

typedef struct {
    Matrix in, other, out;
    const float *vector; /* of the width of a row, or NULL */
    int8_t *codes;
    int64_t codes_stride, plane_stride; /* a plane holds one byte of every code */
    int32_t *sums;                      /* of products [planes, rows, columns]; or counts */
    float *row_scale, *scale, *rstd;    /* one a row; one; one a row or NULL */
    double *partial;
    int64_t rows, columns, first, width, planes, normed_dtype, adds;
    float eps, strength;
} Launch;

typedef void Kernel(const Launch *a, int64_t block, float *restrict scratch);

int64_t size_of_launch(void) { return sizeof(Launch); }

/* --- Threads: those of torch's own OpenMP runtime, taking one block after the other --- */

typedef void Parallel(void (*body)(void *), void *argument, unsigned threads, unsigned flags);

typedef struct {
    Kernel *kernel;
    const Launch *launch;
    int64_t blocks, next, grain, scratch_floats;
    int failed;
} Work;

static void work_on(void *argument) {
    Work *work = argument;
    float *scratch = malloc(sizeof(float) * (size_t)work->scratch_floats);
    if (!scratch) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (;;) {
        int64_t first = __atomic_fetch_add(&work->next, work->grain, __ATOMIC_RELAXED);
        int64_t end = first + work->grain < work->blocks ? first + work->grain : work->blocks;
        if (first >= work->blocks) break;
        for (int64_t block = first; block < end; block++)
            work->kernel(work->launch, block, scratch);
    }
    free(scratch);
}

/* 0, or 1 if there was no memory. `parallel` is GOMP_parallel. */
int launch(Kernel *kernel, const Launch *a, int64_t blocks, int64_t grain, int64_t scratch_floats,
           Parallel *parallel, int threads) {
    Work work = {kernel, a, blocks, 0, grain, scratch_floats, 0};
    int64_t most = (blocks + grain - 1) / grain;
    if (threads > most) threads = (int)most;
    if (threads > 1)
        parallel(work_on, &work, (unsigned)threads, 0);
    else if (blocks)
        work_on(&work);
    return work.failed;
}

/* --- Numbers --- */

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

static inline uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16; /* half to even */
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

static inline float from_fp16(uint16_t h) {
    /* Exponent and mantissa where fp32 has them, then the bias: exact for denormals too. */
    uint32_t magnitude = (uint32_t)(h & 0x7FFF) << 13;
    uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    uint32_t bits = (h & 0x7C00) == 0x7C00 ? magnitude | 0x7F800000 : finite;
    return float_of(bits | (uint32_t)(h & 0x8000) << 16);
}

static inline uint16_t to_fp16(float x) {
    uint32_t magnitude = bits_of(x) & 0x7FFFFFFF;
    uint32_t normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    /* Below 2^-14 in units of 2^-24, which is the last place of ½. */
    uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
    uint32_t h = magnitude < 0x38800000 ? denormal : normal;
    h = magnitude >= 0x477FF000 ? 0x7C00 : h; /* from 65,520 up: infinity */
    h = magnitude > 0x7F800000 ? 0x7E00 : h;
    return (uint16_t)(h | (bits_of(x) >> 16 & 0x8000));
}

/* n elements of a row as fp32: in place if they are, else converted into `buffer`. */
static inline const float *load(Matrix m, int64_t row, int64_t first, int64_t n,
                                float *restrict buffer) {
    int64_t offset = row * m.stride + first;
    if (m.dtype == FP32) return (const float *)m.data + offset;
    const uint16_t *restrict values = (const uint16_t *)m.data + offset;
    if (m.dtype == BF16)
        for (int64_t i = 0; i < n; i++) buffer[i] = from_bf16(values[i]);
    else
        for (int64_t i = 0; i < n; i++) buffer[i] = from_fp16(values[i]);
    return buffer;
}

static inline void store(Matrix m, int64_t row, int64_t first, int64_t n,
                         const float *restrict from) {
    int64_t offset = row * m.stride + first;
    if (m.dtype == FP32) {
        memcpy((float *)m.data + offset, from, sizeof(float) * (size_t)n);
        return;
    }
    uint16_t *restrict values = (uint16_t *)m.data + offset;
    if (m.dtype == BF16)
        for (int64_t i = 0; i < n; i++) values[i] = to_bf16(from[i]);
    else
        for (int64_t i = 0; i < n; i++) values[i] = to_fp16(from[i]);
}

/* Rounded to what `dtype` can hold. */
static inline void round_to(int64_t dtype, int64_t n, float *restrict x) {
    if (dtype == BF16)
        for (int64_t i = 0; i < n; i++) x[i] = from_bf16(to_bf16(x[i]));
    else if (dtype == FP16)
        for (int64_t i = 0; i < n; i++) x[i] = from_fp16(to_fp16(x[i]));
}

/* max |x|, or a NaN if there is one: as integers, the magnitude of a NaN is the largest. */
static inline float peak_of(const float *restrict x, int64_t n) {
    uint32_t peak = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        peak = magnitude > peak ? magnitude : peak;
    }
    return float_of(peak);
}

/* The larger, and a NaN of `x` stays one. */
static inline float at_least(float x, float smallest) { return x < smallest ? smallest : x; }

static inline float nan_to_zero(float x) { return x == x ? x : 0.0f; }

static inline float clip(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

static inline float row_code(float x, float scale) {
    return nearbyintf(clip(nan_to_zero(x / scale), -128.0f, 127.0f));
}

/* round(w / s) is ±1 exactly if 2|w| > s, both of which are exact: triton_weight.py. */
static inline float ternary_code(float w, float scale) {
    return 2.0f * fabsf(w) > scale ? (w < 0.0f ? -1.0f : 1.0f) : 0.0f;
}

/* x + λ (q − x), exactly q at λ = 1, as torch.lerp computes it. */
static inline float lerp(float x, float q, float strength) {
    float coefficient = strength < 0.5f ? strength : strength - 1.0f;
    return fmaf(coefficient, q - x, strength < 0.5f ? x : q);
}

/* Sums in fp64 over LANES that do not depend on the machine. */

typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef double Wide __attribute__((vector_size(8 * LANES)));

static inline double total_of(const Wide *sums) {
    double total = 0.0;
    for (int lane = 0; lane < LANES; lane++) total += (*sums)[lane];
    return total;
}

/* Adding and subtracting TO_GRID rounds to multiples of 2^-30, whose sums are exact (quantizer.py:
exact_sum). */
#define TO_GRID (1.5 * 4194304.0)

static inline double sum_of_magnitudes(const float *restrict x, int64_t n) {
    Wide sums = {0};
    double rest = 0.0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Bits magnitude;
        memcpy(&magnitude, x + i, sizeof magnitude);
        magnitude &= 0x7FFFFFFF;
        sums += __builtin_convertvector((Lanes)magnitude, Wide) + TO_GRID - TO_GRID;
    }
    for (; i < n; i++) rest += fabs((double)x[i]) + TO_GRID - TO_GRID;
    return total_of(&sums) + rest;
}

static inline double dot(const float *restrict x, const float *restrict y, int64_t n) {
    Wide sums = {0};
    double rest = 0.0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Lanes a, b;
        memcpy(&a, x + i, sizeof a);
        memcpy(&b, y + i, sizeof b);
        sums += __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
    }
    for (; i < n; i++) rest += (double)x[i] * (double)y[i];
    return total_of(&sums) + rest;
}

/* --- Weights: blocks of WEIGHTS_PER_BLOCK elements of `in`, N = columns --- */

static inline int64_t end_of_block(const Launch *a, int64_t block) {
    int64_t end = (block + 1) * WEIGHTS_PER_BLOCK;
    return end < a->columns ? end : a->columns;
}

/* partial[block] = Σ|w| in fp64. */
void abs_sum(const Launch *a, int64_t block, float *restrict scratch) {
    int64_t end = end_of_block(a, block);
    double total = 0.0;
    for (int64_t first = block * WEIGHTS_PER_BLOCK; first < end; first += TILE) {
        int64_t n = end - first < TILE ? end - first : TILE;
        total += sum_of_magnitudes(load(a->in, 0, first, n, scratch), n);
    }
    a->partial[block] = total;
}

/* codes, by `scale`. */
void ternary_codes(const Launch *a, int64_t block, float *restrict scratch) {
    int64_t end = end_of_block(a, block);
    float scale = *a->scale;
    for (int64_t first = block * WEIGHTS_PER_BLOCK; first < end; first += TILE) {
        int64_t n = end - first < TILE ? end - first : TILE;
        const float *restrict w = load(a->in, 0, first, n, scratch);
        int8_t *restrict codes = a->codes + first;
        for (int64_t i = 0; i < n; i++) codes[i] = (int8_t)ternary_code(w[i], scale);
    }
}

/* out = w + strength (scale · code − w). */
void blend_weights(const Launch *a, int64_t block, float *restrict scratch) {
    int64_t end = end_of_block(a, block);
    float scale = *a->scale, strength = a->strength, *restrict blended = scratch + TILE;
    for (int64_t first = block * WEIGHTS_PER_BLOCK; first < end; first += TILE) {
        int64_t n = end - first < TILE ? end - first : TILE;
        const float *restrict w = load(a->in, 0, first, n, scratch);
        for (int64_t i = 0; i < n; i++)
            blended[i] = lerp(w[i], ternary_code(w[i], scale) * scale, strength);
        store(a->out, 0, first, n, blended);
    }
}

/* Histograms of |w|'s bits, one of BINS a block, a block being `width` elements: of the upper 16
bits with every NaN in the last bin; or, given first >= 0, of the lower 15 where the upper are
`first`. */
void count_magnitudes(const Launch *a, int64_t block, float *restrict scratch) {
    int64_t end = (block + 1) * a->width < a->columns ? (block + 1) * a->width : a->columns;
    int32_t *restrict counts = a->sums + block * BINS;
    memset(counts, 0, sizeof(int32_t) * BINS);
    for (int64_t start = block * a->width; start < end; start += TILE) {
        int64_t n = end - start < TILE ? end - start : TILE;
        const float *restrict w = load(a->in, 0, start, n, scratch);
        for (int64_t i = 0; i < n; i++) {
            uint32_t magnitude = bits_of(w[i]) & 0x7FFFFFFF;
            uint32_t upper = magnitude > 0x7F800000 ? BINS - 1 : magnitude >> 15;
            if (a->first < 0)
                counts[upper]++;
            else if (upper == a->first)
                counts[magnitude & 0x7FFF]++;
        }
    }
}

/* --- Activations: a block is a row of `in` --- */

/* row_scale and codes; given rstd, of x · rstd · vector, rounded where the unfused norm rounds. */
void quantize_row(const Launch *a, int64_t row, float *restrict scratch) {
    int64_t D = a->columns;
    const float *restrict h = load(a->in, row, 0, D, scratch);
    if (a->rstd) {
        float rstd = a->rstd[row];
        const float *restrict x = h;
        float *restrict normed = scratch + D;
        for (int64_t i = 0; i < D; i++) normed[i] = x[i] * rstd;
        round_to(a->in.dtype, D, normed);
        if (a->vector) {
            for (int64_t i = 0; i < D; i++) normed[i] = normed[i] * a->vector[i];
            round_to(a->normed_dtype, D, normed);
        }
        h = normed;
    }
    float scale = at_least(peak_of(h, D), a->eps) / 127.0f;
    int8_t *restrict codes = a->codes + row * D;
    a->row_scale[row] = scale;
    for (int64_t i = 0; i < D; i++) codes[i] = (int8_t)row_code(h[i], scale);
}

/* out = x + strength (x̂ − x). */
void blend_row(const Launch *a, int64_t row, float *restrict scratch) {
    int64_t D = a->columns;
    const float *restrict x = load(a->in, row, 0, D, scratch);
    float scale = at_least(peak_of(x, D), a->eps) / 127.0f;
    float strength = a->strength, *restrict blended = scratch + D;
    for (int64_t i = 0; i < D; i++)
        blended[i] = lerp(x[i], row_code(x[i], scale) * scale, strength);
    store(a->out, row, 0, D, blended);
}

/* out = codes · row_scale: x̂ for a product in floating point. */
void dequantize_row(const Launch *a, int64_t row, float *restrict scratch) {
    int64_t D = a->columns;
    const int8_t *restrict codes = a->codes + row * a->codes_stride;
    float scale = a->row_scale[row];
    for (int64_t i = 0; i < D; i++) scratch[i] = (float)codes[i] * scale;
    store(a->out, row, 0, D, scratch);
}

/* Gradient of RMSNorm of the rows of a block of `width`: in = ∂L/∂normed, other = x, out = ∂L/∂x,
sums (as fp32) = the block's share of ∂L/∂weight, vector = weight. */
void rms_norm_grad(const Launch *a, int64_t block, float *restrict scratch) {
    int64_t D = a->columns, end = (block + 1) * a->width;
    if (end > a->rows) end = a->rows;
    float *restrict normed = scratch + 2 * D, *restrict grad_x = scratch + 3 * D;
    float *restrict grad_weight = a->vector ? (float *)a->sums + block * D : NULL;
    if (grad_weight) memset(grad_weight, 0, sizeof(float) * (size_t)D);
    for (int64_t row = block * a->width; row < end; row++) {
        const float *restrict grad = load(a->in, row, 0, D, scratch);
        const float *restrict x = load(a->other, row, 0, D, scratch + D);
        float rstd = a->rstd[row];
        for (int64_t i = 0; i < D; i++) normed[i] = x[i] * rstd;
        for (int64_t i = 0; i < D; i++) grad_x[i] = a->vector ? grad[i] * a->vector[i] : grad[i];
        float mean = (float)(dot(grad_x, normed, D) / (double)D);
        for (int64_t i = 0; i < D; i++) grad_x[i] = rstd * (grad_x[i] - normed[i] * mean);
        store(a->out, row, 0, D, grad_x);
        if (!grad_weight) continue;
        /* The unfused norm multiplies the weight with rows rounded to x's dtype. */
        round_to(a->other.dtype, D, normed);
        for (int64_t i = 0; i < D; i++) grad_weight[i] += grad[i] * normed[i];
    }
}

/* --- Products of integers --- */

/* out = (Σ_plane 256^(planes − 1 − plane) · sums) · row_scale [· scale] [+ vector] [+ out]. A single
plane of sums may lie where `out` does. */
void scale_sums(const Launch *a, int64_t row, float *restrict scratch) {
    int64_t n = a->columns, plane = a->rows * n;
    const int32_t *high = a->sums + row * n, *middle = high + plane, *low = middle + plane;
    float r = a->row_scale[row], *restrict y = scratch;
    if (a->planes == 1)
        for (int64_t i = 0; i < n; i++) y[i] = (float)high[i] * r;
    else if (a->planes == 2)
        for (int64_t i = 0; i < n; i++) y[i] = (float)((int64_t)high[i] * 256 + middle[i]) * r;
    else
        for (int64_t i = 0; i < n; i++)
            y[i] = (float)(((int64_t)high[i] * 256 + middle[i]) * 256 + low[i]) * r;
    if (a->scale) {
        float s = *a->scale;
        for (int64_t i = 0; i < n; i++) y[i] = y[i] * s;
    }
    if (a->vector)
        for (int64_t i = 0; i < n; i++) y[i] = y[i] + a->vector[i];
    if (a->adds) {
        const float *restrict before = load(a->out, row, 0, n, scratch + n);
        for (int64_t i = 0; i < n; i++) y[i] = before[i] + y[i];
    }
    store(a->out, row, 0, n, y);
}

static inline float limit_of(int64_t planes) {
    return planes == 1 ? 127.0f : planes == 2 ? 127.0f * 256.0f : 127.0f * 65536.0f;
}

static inline float step_of(float peak, float eps, int64_t planes) {
    return at_least(peak, eps) / limit_of(planes);
}

/* u in [0, 1): murmur3's finalizer of the gradient's bits and its position. */
static inline float noise(float g, uint32_t position) {
    uint32_t word = bits_of(g) ^ position * 0x9E3779B1u;
    word = (word ^ word >> 16) * 0x85EBCA6Bu;
    word = (word ^ word >> 13) * 0xC2B2AE35u;
    word = word ^ word >> 16;
    return (float)(int32_t)(word >> 8) * 0x1p-24f;
}

/* The signed bytes of n codes, most significant first, one a plane. step[i · per_element]. */
static inline __attribute__((always_inline)) void
gradient_codes(const float *restrict g, const float *restrict step, const int per_element,
               uint32_t position, int64_t n, const int planes, int8_t *restrict codes,
               int64_t plane_stride) {
    const float limit = limit_of(planes);
    for (int64_t i = 0; i < n; i++) {
        float scaled = g[i] / step[i * per_element];
        float rounded = planes == 1 ? floorf(scaled + noise(g[i], position + (uint32_t)i))
                                    : nearbyintf(scaled);
        int32_t code = (int32_t)clip(nan_to_zero(rounded), -limit, limit);
        if (planes == 1) {
            codes[i] = (int8_t)code;
            continue;
        }
        int32_t low = ((code + 128) & 255) - 128;
        int32_t rest = (code - low) >> 8;
        if (planes == 2) {
            codes[i] = (int8_t)rest;
            codes[i + plane_stride] = (int8_t)low;
            continue;
        }
        int32_t middle = ((rest + 128) & 255) - 128;
        codes[i] = (int8_t)((rest - middle) >> 8);
        codes[i + plane_stride] = (int8_t)middle;
        codes[i + 2 * plane_stride] = (int8_t)low;
    }
}

static inline __attribute__((always_inline)) void
gradient_codes_of(const Launch *a, const float *g, const float *step, const int per_element,
                  uint32_t position, int64_t n, int8_t *codes) {
    switch (a->planes) { /* so that the compiler sees three loops with constants */
    case 1: gradient_codes(g, step, per_element, position, n, 1, codes, a->plane_stride); break;
    case 2: gradient_codes(g, step, per_element, position, n, 2, codes, a->plane_stride); break;
    case 3: gradient_codes(g, step, per_element, position, n, 3, codes, a->plane_stride); break;
    }
}

/* A step and codes for a row; `first` is the place of row 0 in the whole gradient. */
void gradient_row(const Launch *a, int64_t row, float *restrict scratch) {
    int64_t F = a->columns;
    const float *restrict g = load(a->in, row, 0, F, scratch);
    float step = step_of(peak_of(g, F), a->eps, a->planes);
    a->row_scale[row] = step;
    uint32_t position = (uint32_t)((a->first + row) * F);
    gradient_codes_of(a, g, &step, 0, position, F, a->codes + row * a->codes_stride);
}

/* A step (in row_scale) and codes for each of STRIPE columns of g · rstd, of `width` columns from
`first` on: twice through all rows, so that the second time finds them in the cache. */
void gradient_columns(const Launch *a, int64_t stripe, float *restrict scratch) {
    int64_t offset = stripe * STRIPE, column = a->first + offset;
    int64_t n = a->width - offset < STRIPE ? a->width - offset : STRIPE;
    float *restrict scaled = scratch + STRIPE, step[STRIPE];
    uint32_t peak[STRIPE] = {0};
    for (int64_t t = 0; t < a->rows; t++) {
        const float *restrict g = load(a->in, t, column, n, scratch);
        float r = a->rstd[t];
        for (int64_t i = 0; i < n; i++) {
            uint32_t magnitude = bits_of(g[i] * r) & 0x7FFFFFFF;
            peak[i] = magnitude > peak[i] ? magnitude : peak[i];
        }
    }
    for (int64_t i = 0; i < n; i++)
        a->row_scale[offset + i] = step[i] = step_of(float_of(peak[i]), a->eps, a->planes);
    for (int64_t t = 0; t < a->rows; t++) {
        const float *restrict g = load(a->in, t, column, n, scratch);
        float r = a->rstd[t];
        for (int64_t i = 0; i < n; i++) scaled[i] = g[i] * r;
        uint32_t position = (uint32_t)(t * a->columns + column);
        gradient_codes_of(a, scaled, step, 1, position, n, a->codes + t * a->codes_stride + offset);
    }
}
