// The register tile of all products, and the panels that it reads.
//
// A panel holds some outputs of a weight [N, K]: those of one input are adjacent.
#pragma once

#include <type_traits>
#include <utility>

#include "vector.h"

// A register tile: 6 x 4 sums and 4 vectors of the right side fit into 32 registers, half of it into 16.
constexpr int64_t HIGH = 6;                     // rows
constexpr int WIDE_VECTORS = REGISTERS / 8;     // vectors of columns
constexpr int64_t WIDE = WIDE_VECTORS * LANES;  // columns

#define INLINE static inline __attribute__((always_inline))
// A lambda that is always inlined.
#define BODY(...) [&](__VA_ARGS__) __attribute__((always_inline))

// Calls body with the largest R <= rows and V <= columns / LANES as constants:
// body(std::integral_constant<int, R>, std::integral_constant<int, V>).
template <int R = HIGH, int V = WIDE_VECTORS, typename Body>
static inline void sized(int64_t rows, int64_t columns, Body body) {
    if (V * LANES > columns) {
        if constexpr (V > 1) sized<R, V - 1>(rows, columns, body);
    } else if (R > rows) {
        if constexpr (R > 1) sized<R - 1, V>(rows, columns, body);
    } else {
        body(std::integral_constant<int, R>{}, std::integral_constant<int, V>{});
    }
}

template <int... I, typename Body>
INLINE void written_out(std::integer_sequence<int, I...>, Body body) {
    (body(I), ...);
}

// Calls body(0) .. body(N - 1), each call written out. Arrays that the argument indexes stay in registers;
// an unrolled loop does not ensure that.
template <int N, typename Body>
INLINE void times(Body body) {
    written_out(std::make_integer_sequence<int, N>{}, body);
}

// Calls body(r, v) for every vector of a tile of R x V.
template <int R, int V, typename Body>
INLINE void each_vector(Body body) {
    times<R * V>(BODY(int i) { body(i / V, i % V); });
}

// sum[R][V] += left(r) right[V]
template <int R, int V, typename Left>
INLINE void add_products(Left left, const Vector (&right)[V], Vector (&sum)[R][V]) {
    each_vector<R, V>(BODY(int r, int v) {
        sum[r][v] = multiply_add(broadcast(left(r)), right[v], sum[r][v]);
    });
}

// A register tile: out(r) (+)= the sum over k < n of left(r, k) right(k), V vectors each, for R rows.
template <int R, int V, typename Left, typename Right, typename Out>
INLINE void tile(int64_t n, Left left, Right right, Out out, bool add) {
    Vector sum[R][V];
    each_vector<R, V>(BODY(int r, int v) {
        sum[r][v] = add ? load(out(r) + v * LANES) : broadcast(0.0f);
    });
    for (int64_t k = 0; k < n; k++) {
        const float* from = right(k);
        Vector wide[V];
        times<V>(BODY(int v) { wide[v] = load(from + v * LANES); });
        add_products<R, V>(BODY(int r) { return left(r, k); }, wide, sum);
    }
    each_vector<R, V>(BODY(int r, int v) { store(out(r) + v * LANES, sum[r][v]); });
}

// LANES inputs from k on of LANES outputs from o on of weight[N, K], one vector per input; zeros beyond
// the weight's end.
static inline void tile_of(const float* weight, int64_t outputs, int64_t inputs, int64_t o,
                           int64_t k, Vector* rows) {
    int64_t n = least(LANES, inputs - k);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        rows[i] = load_some(weight + (o + i) * inputs + k, o + i < outputs ? n : 0);
    transpose(rows);
}

// The outputs at .. at + width of weight[N, K] as a panel [K, width]; the width is a multiple of 16.
static inline void pack_panel(const float* weight, float* panel, int64_t outputs, int64_t inputs,
                              int64_t at, int64_t width) {
    for (int64_t j = 0; j < width; j += LANES)
        for (int64_t k = 0; k < inputs; k += LANES) {
            Vector rows[LANES];
            tile_of(weight, outputs, inputs, at + j, k, rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (k + i < inputs) store(panel + (k + i) * width + j, rows[i]);
        }
}
