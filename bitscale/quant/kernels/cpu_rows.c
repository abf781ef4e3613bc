/* Codes, norms and blends, and how every kernel is launched: cpu.h. */

#include "cpu.h"

enum { WEIGHTS_PER_BLOCK = 16384, TILE = 2048, BINS = 65536, LANES = 16 };

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

/* Σ x² as torch.sum adds the squares on an x86 (ATen's cascade sum): four vectors of 8 side by side;
every 16 rows of them go to the next level; then tail and lanes one by one. cpu_rows.py tries
whether it has torch's bits. */
static inline float sum_of_squares(const float *restrict x, int64_t n) {
    enum { LEVELS = 4, lanes = 8, width = 4 * lanes };
    float sums[LEVELS][width] = {{0}}, total = 0.0f;
    int64_t rows = n / width, vectors = n / lanes, row = 0;
    if (n < lanes) { /* four scalars side by side */
        for (int64_t i = 0; i < n; i++) sums[0][i < n / 4 * 4 ? i : 0] += x[i] * x[i];
        for (int i = 0; i < 4; i++) total += sums[0][i];
        return total;
    }
    while (row + 16 <= rows) {
        float part[width] = {0}; /* in registers */
        for (int64_t end = row + 16; row < end; row++)
            for (int i = 0; i < width; i++) part[i] += x[row * width + i] * x[row * width + i];
        for (int i = 0; i < width; i++) sums[1][i] += part[i];
        for (int level = 2; level < LEVELS && !(row & (int64_t)15 << 4 * (level - 1)); level++)
            for (int i = 0; i < width; i++) {
                sums[level][i] += sums[level - 1][i];
                sums[level - 1][i] = 0.0f;
            }
    }
    for (; row < rows; row++)
        for (int i = 0; i < width; i++) sums[0][i] += x[row * width + i] * x[row * width + i];
    for (int level = 1; level < LEVELS; level++)
        for (int i = 0; i < width; i++) sums[0][i] += sums[level][i];
    for (int64_t i = rows * width; i < vectors * lanes; i++)
        sums[0][i % lanes] += x[i] * x[i];
    for (int k = 1; k < 4; k++)
        for (int i = 0; i < lanes; i++) sums[0][i] += sums[0][k * lanes + i];
    for (int64_t i = vectors * lanes; i < n; i++) total += x[i] * x[i];
    for (int i = 0; i < lanes; i++) total += sums[0][i];
    return total;
}

/* row_scale and codes; if there is rstd, of x · rstd · vector, rounded where the unfused norm rounds.
With the flag rstd is computed here, else given. */
void quantize_row(const Launch *a, int64_t row, float *restrict scratch) {
    int64_t D = a->columns;
    const float *restrict h = load(a->in, row, 0, D, scratch);
    if (a->rstd) {
        const float *restrict x = h;
        if (a->flag) a->rstd[row] = 1.0f / sqrtf(sum_of_squares(x, D) / (float)D + a->norm_eps);
        float rstd = a->rstd[row];
        float *restrict normed = scratch + D;
        const float *restrict weight = a->vector;
        if (weight && a->in.dtype == FP32) { /* nothing is rounded between: one pass */
            for (int64_t i = 0; i < D; i++) normed[i] = x[i] * rstd * weight[i];
        } else {
            for (int64_t i = 0; i < D; i++) normed[i] = x[i] * rstd;
            round_to(a->in.dtype, D, normed);
            for (int64_t i = 0; weight && i < D; i++) normed[i] = normed[i] * weight[i];
            if (weight) round_to(a->normed_dtype, D, normed);
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
