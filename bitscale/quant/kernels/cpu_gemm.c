/* Around the products of cpu_gemm.py: gradients to integers, sums to results; and a product of fp32
with codes: cpu.h. */

#include "cpu.h"

enum { STRIPE = 64 };

/* --- Products of integers --- */

/* out = (Σ_plane 256^(planes − 1 − plane) · sums) · row_scale [· scale] [+ vector], [+ out] with the
flag. A single plane of sums may lie where `out` does. */
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
    if (a->flag) {
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

/* --- Products in fp32 --- */

#ifdef __AVX512F__
#include <immintrin.h>

enum { TILE_ROWS = 12, TILE_COLUMNS = 32, CHAIN = 128, DEPTH = 512, BLOCK_ROWS = 96 };

int multiplies_fp32(void) { return 1; }

/* One panel of TILE_COLUMNS columns of the codes [width, columns], as fp32 and times row_scale if it
is given, to other [panels, width, TILE_COLUMNS]; beyond the last column zeros. */
void pack_panel(const Launch *a, int64_t panel, float *restrict scratch) {
    (void)scratch;
    int64_t column = panel * TILE_COLUMNS;
    int64_t n = a->columns - column < TILE_COLUMNS ? a->columns - column : TILE_COLUMNS;
    float *restrict packed = (float *)a->other.data + column * a->width;
    for (int64_t k = 0; k < a->width; k++, packed += TILE_COLUMNS) {
        const int8_t *restrict codes = a->codes + k * a->codes_stride + column;
        float scale = a->row_scale ? a->row_scale[k] : 1.0f;
        for (int64_t i = 0; i < n; i++) packed[i] = (float)codes[i] * scale;
        for (int64_t i = n; i < TILE_COLUMNS; i++) packed[i] = 0.0f;
    }
}

/* tile [TILE_ROWS, TILE_COLUMNS] = packed a [K, TILE_ROWS]ᵀ @ packed b [K, TILE_COLUMNS], in chains of
CHAIN additions: longer ones would be less exact than a library's product. */
static inline void multiply_tile(const float *restrict a, const float *restrict b, int64_t K,
                                 float *restrict tile) {
    for (int64_t first = 0; first < K; first += CHAIN) {
        __m512 left[TILE_ROWS], right[TILE_ROWS];
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; i++) left[i] = right[i] = _mm512_setzero_ps();
        int64_t end = first + CHAIN < K ? first + CHAIN : K;
        for (int64_t k = first; k < end; k++) {
            __m512 b_left = _mm512_loadu_ps(b + k * TILE_COLUMNS);
            __m512 b_right = _mm512_loadu_ps(b + k * TILE_COLUMNS + 16);
#pragma GCC unroll 12
            for (int i = 0; i < TILE_ROWS; i++) {
                __m512 value = _mm512_set1_ps(a[k * TILE_ROWS + i]);
                left[i] = _mm512_fmadd_ps(value, b_left, left[i]);
                right[i] = _mm512_fmadd_ps(value, b_right, right[i]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; i++) {
            float *row = tile + i * TILE_COLUMNS;
            if (first) {
                left[i] = _mm512_add_ps(left[i], _mm512_loadu_ps(row));
                right[i] = _mm512_add_ps(right[i], _mm512_loadu_ps(row + 16));
            }
            _mm512_storeu_ps(row, left[i]);
            _mm512_storeu_ps(row + 16, right[i]);
        }
    }
}

/* K of the rows of A = in (or of its transpose, with the flag) from `row` on, as [rows /
TILE_ROWS, K, TILE_ROWS]; beyond the last row zeros. */
static inline void pack_rows(const Launch *a, int64_t row, int64_t rows, int64_t first, int64_t K,
                             float *restrict packed) {
    int64_t row_stride = a->flag ? 1 : a->in.stride, stride = a->flag ? a->in.stride : 1;
    for (int64_t m = 0; m < rows; m += TILE_ROWS, packed += K * TILE_ROWS) {
        const float *restrict from =
            (const float *)a->in.data + (row + m) * row_stride + first * stride;
        int64_t n = rows - m < TILE_ROWS ? rows - m : TILE_ROWS;
        for (int64_t k = 0; k < K; k++) {
            for (int64_t i = 0; i < n; i++)
                packed[k * TILE_ROWS + i] = from[i * row_stride + k * stride];
            for (int64_t i = n; i < TILE_ROWS; i++) packed[k * TILE_ROWS + i] = 0.0f;
        }
    }
}

/* BLOCK_ROWS rows of out [rows, columns] = (A @ codes) [· scale], A [rows, width] as in pack_rows and
the codes as pack_panel left them in `other`. */
void multiply_rows(const Launch *a, int64_t block, float *restrict scratch) {
    int64_t row = block * BLOCK_ROWS, K = a->width;
    int64_t rows = a->rows - row < BLOCK_ROWS ? a->rows - row : BLOCK_ROWS;
    float *restrict tile = scratch, *restrict packed = scratch + TILE_ROWS * TILE_COLUMNS;
    for (int64_t first = 0; first < K; first += DEPTH) {
        int64_t depth = K - first < DEPTH ? K - first : DEPTH;
        float scale = a->scale && first + depth == K ? *a->scale : 1.0f;
        pack_rows(a, row, rows, first, depth, packed);
        for (int64_t column = 0; column < a->columns; column += TILE_COLUMNS) {
            const float *b = (const float *)a->other.data + column * K + first * TILE_COLUMNS;
            int64_t n = a->columns - column < TILE_COLUMNS ? a->columns - column : TILE_COLUMNS;
            for (int64_t m = 0; m < rows; m += TILE_ROWS) {
                multiply_tile(packed + m * depth, b, depth, tile);
                int64_t end = rows - m < TILE_ROWS ? rows - m : TILE_ROWS;
                for (int64_t i = 0; i < end; i++) {
                    float *restrict out =
                        (float *)a->out.data + (row + m + i) * a->out.stride + column;
                    const float *restrict sums = tile + i * TILE_COLUMNS;
                    for (int64_t j = 0; j < n; j++)
                        out[j] = ((first ? out[j] : 0.0f) + sums[j]) * scale;
                }
            }
        }
    }
}
#else
int multiplies_fp32(void) { return 0; }
#endif
