// Vectors of 16 fp32 numbers, and products of small tiles.
//
// Uses the compiler's vector types, each one AVX-512 register; setup.py sets the instructions that
// the compiler may use.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

constexpr int64_t LANES = 16;
constexpr int64_t WIDE = 4 * LANES;  // columns of a register tile
constexpr int64_t HIGH = 6;  // rows of one: 6 x 4 sums and 4 of the right side fit into the registers

// n, rounded up to whole vectors.
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Calls body with the largest R <= rows and V <= columns / 16 as constants:
// body(std::integral_constant<int, R>, std::integral_constant<int, V>).
template <int R = HIGH, int V = 4, typename Body>
static inline void sized(int64_t rows, int64_t columns, Body body) {
    if (V * LANES > columns) {
        if constexpr (V > 1) sized<R, V - 1>(rows, columns, body);
    } else if (R > rows) {
        if constexpr (R > 1) sized<R - 1, V>(rows, columns, body);
    } else {
        body(std::integral_constant<int, R>{}, std::integral_constant<int, V>{});
    }
}

typedef float Vector __attribute__((vector_size(64)));
typedef float Loose __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(64)));

static inline Vector load(const float* from) { return *(const Loose*)from; }
static inline void store(float* to, Vector x) { *(Loose*)to = x; }
static inline Vector all(float x) { return x - (Vector){}; }

// Sixteen int8 numbers as fp32.
static inline Vector load_bytes(const int8_t* from) {
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}

// Stores integers between -128 and 127 as int8.
static inline void store_bytes(int8_t* to, Vector x) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x)));
}

// Rounds to the nearest integer, ties to even.
static inline Vector rounded(Vector x) { return (Vector)_mm512_roundscale_ps((__m512)x, 8); }

// Loads the first n of sixteen numbers; the others become `other`.
static inline Vector load_some(const float* from, int64_t n, float other = 0.0f) {
    Vector x = all(other);
    memcpy(&x, from, n * sizeof(float));
    return x;
}

static inline void store_some(float* to, Vector x, int64_t n) {
    memcpy(to, &x, n * sizeof(float));
}

// Calls body(at, n) for all columns, n <= 16 at a time.
template <typename Body>
static inline void columns(int64_t width, Body body) {
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES) body(at, LANES);
    if (at < width) body(at, width - at);
}

static inline Vector take(const float* from, int64_t n) {
    return n == LANES ? load(from) : load_some(from, n);
}

static inline void put(float* to, Vector x, int64_t n) {
    n == LANES ? store(to, x) : store_some(to, x, n);
}

// A mask of the lanes `at` .. `at` + 15: all ones for those before `end`.
static inline Whole before(int64_t at, int64_t end) {
    const Whole lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lanes < (int32_t)(end - at) - (Whole){};
}

// One step of a transposition: exchanges blocks of STEP lanes.
template <int STEP>
static inline void exchange(Vector* rows) {
    Whole upper, lower;
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
        upper[j] = j & STEP ? LANES + j - STEP : j;
        lower[j] = j & STEP ? LANES + j : j + STEP;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & STEP) continue;
        Vector a = rows[i], b = rows[i + STEP];
        rows[i] = __builtin_shuffle(a, b, upper);
        rows[i + STEP] = __builtin_shuffle(a, b, lower);
    }
}

static inline void transpose(Vector* rows) {
    exchange<8>(rows);
    exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
}

// a * b + c, rounded once. Used where a sum must have the same bits in loops of any shape: on its own,
// the compiler rounds twice in some of them.
static inline Vector multiply_add(Vector a, Vector b, Vector c) {
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
static inline Vector size_of(Vector x) { return x < all(0.0f) ? -x : x; }

typedef float Half __attribute__((vector_size(32)));
typedef float LooseHalf __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quarter __attribute__((vector_size(16)));

static inline float sum_of(Vector x) {
    Half halves[2];
    Quarter quarters[2];
    memcpy(halves, &x, sizeof(x));
    halves[0] += halves[1];
    memcpy(quarters, halves, sizeof(quarters));
    Quarter four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

static inline float largest_of(Vector x) {
    Half halves[2];
    Quarter quarters[2];
    memcpy(halves, &x, sizeof(x));
    halves[0] = halves[0] > halves[1] ? halves[0] : halves[1];
    memcpy(quarters, halves, sizeof(quarters));
    Quarter four = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
    float a = four[0] > four[2] ? four[0] : four[2], b = four[1] > four[3] ? four[1] : four[3];
    return a > b ? a : b;
}

// exp to about one unit in the last place; below -87 it returns about 1e-38, and infinity on overflow.
// NaN stays NaN.
static inline Vector exp_of(Vector given) {
    const Vector most = all(88.72283f);  // the largest x without overflow
    Vector x = given < all(-87.0f) ? all(-87.0f) : given;
    x = x > most ? most : x;
    const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vector shifted = x * all(1.44269504088896341f) + magic;
    Vector n = shifted - magic;
    Vector r = x - n * all(0.693359375f);
    r = r - n * all(-2.12194440e-4f);
    // Polynomial for |r| <= ln(2) / 2 (Cephes' expf).
    Vector p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    Whole exponent = ((Whole)shifted) << 23;  // the integer is in the lowest bits
    // NaN is returned separately: shifting its bits would give a finite number.
    return given <= most ? (Vector)((Whole)p + exponent) : given + all(INFINITY);
}

static inline Vector sigmoid(Vector x) { return all(1.0f) / (all(1.0f) + exp_of(-x)); }

// Allocates scratch memory, which the caller frees.
static inline float* scratch(int64_t numbers) {
    return (float*)aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64);
}

// c[R, 16 V] (+)= a[R, k] b[k, 16 V]; a's element (i, j) is at i * rows + j * columns.
template <int R, int V>
static inline void tile(const float* a, int64_t rows, int64_t columns, const float* b, int64_t ldb,
                        int64_t k, float* c, int64_t ldc, bool add) {
    Vector sum[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[i][v] = add ? load(c + i * ldc + v * LANES) : all(0.0f);
    for (int64_t j = 0; j < k; j++) {
        Vector right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) right[v] = load(b + j * ldb + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            Vector left = all(a[i * rows + j * columns]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[i][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(c + i * ldc + v * LANES, sum[i][v]);
}

constexpr int64_t ROWS = 8;  // rows of a tile of attention: 8 x 2 sums leave registers for operands

// The same for eight rows and n columns, a multiple of 16.
static inline void product(const float* a, int64_t rows, int64_t columns, const float* b,
                           int64_t ldb, int64_t k, float* c, int64_t ldc, int64_t n, bool add) {
    int64_t at = 0;
    for (; at + 2 * LANES <= n; at += 2 * LANES)
        tile<ROWS, 2>(a, rows, columns, b + at, ldb, k, c + at, ldc, add);
    if (at < n) tile<ROWS, 1>(a, rows, columns, b + at, ldb, k, c + at, ldc, add);
}
