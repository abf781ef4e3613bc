/* What cpu_rows.c, cpu_gemm.c and cpu_pack.c share: a launch, numbers, and how rows are read and
written.

A kernel is a function of (launch, block): block is a row of a matrix, or so many elements of a
weight; which fields of the launch it uses says its comment. cpu_library.py compiles the three files
when they are first needed and mirrors `Launch`. Plain C of gcc and clang, without torch's headers.

Shapes: T tokens, D inputs, F outputs, N = F·D weights. The specification of every formula is
plain.py and plain_backward.py. Compiled without -ffast-math and with -ffp-contract=off: a result
that plain.py rounds is rounded here too, so that codes are equal bit for bit. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FP32, BF16, FP16 };

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
    int64_t rows, columns, first, width, planes, normed_dtype, flag;
    float eps, norm_eps, strength;
} Launch;

typedef void Kernel(const Launch *a, int64_t block, float *restrict scratch);

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
