// Products of rows that lie anywhere, each found by its pointer: nothing is gathered for them.
//
// All widths are multiples of 16. Of the right side 64 columns at a time are in the registers' reach.
#pragma once

#include <type_traits>

#include "vector.h"

constexpr int64_t WIDE = 4 * LANES;
constexpr int64_t HIGH = 6;  // 6 x 4 sums and 4 of the right side: what the registers hold

static inline int64_t width_at(int64_t at, int64_t all_columns) {
    return all_columns - at < WIDE ? all_columns - at : WIDE;
}

// weight[N, K] into panels of 64 outputs, for every input side by side.
static void pack_panels(const float* weight, float* panel, int64_t outputs, int64_t inputs) {
    for (int64_t at = 0; at < outputs; at += WIDE) {
        int64_t width = width_at(at, outputs);
        for (int64_t j = 0; j < width; j += LANES)
            for (int64_t k = 0; k < inputs; k += LANES) {
                Vector rows[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) rows[i] = load(weight + (at + j + i) * inputs + k);
                transpose(rows);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store(panel + (k + i) * width + j, rows[i]);
            }
        panel += width * inputs;
    }
}

// The same of a weight that lies turned, [K, N].
static void pack_turned(const float* weight, float* panel, int64_t outputs, int64_t inputs) {
    for (int64_t at = 0; at < outputs; at += WIDE) {
        int64_t width = width_at(at, outputs);
        for (int64_t k = 0; k < inputs; k++, panel += width)
            memcpy(panel, weight + k * outputs + at, width * sizeof(float));
    }
}

// out[r][at + 16 V] = x[r][K] panel[K, 16 V], of R rows.
template <int R, int V>
static void rows_product(const float* const* x, const float* panel, float* const* out, int64_t at,
                         int64_t inputs) {
    Vector sum[R][V];
    const float* row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        row[r] = x[r];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            sum[r][v] = all(0.0f);
            __builtin_prefetch(out[r] + at + v * LANES, 1);
        }
    }
    for (int64_t k = 0; k < inputs; k++, panel += V * LANES) {
        Vector right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) right[v] = load(panel + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vector left = all(row[r][k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] = multiply_add(left, right[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(out[r] + at + v * LANES, sum[r][v]);
}

// out[R, 16 V] (+)= sum over n rows of left[i][.. R] right[i][.. 16 V].
template <int R, int V>
static void sum_of_products(const float* const* left, int64_t up, const float* const* right,
                            int64_t at, int64_t n, float* out, int64_t ld, bool add) {
    Vector sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = add ? load(out + r * ld + v * LANES) : all(0.0f);
    for (int64_t i = 0; i < n; i++) {
        const float *x = left[i] + up, *y = right[i] + at;
        __builtin_prefetch(x + LANES);  // the next rows of `out` want it
        Vector wide[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) wide[v] = load(y + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vector one = all(x[r]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] = multiply_add(one, wide[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(out + r * ld + v * LANES, sum[r][v]);
}

// Calls body with R and V as constants: body(std::integral_constant<int, R>, <int, V>).
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

// out[M, N] = x[M, K] times a packed weight.
static void product_of_rows(const float* const* x, const float* packed, float* const* out,
                            int64_t rows, int64_t outputs, int64_t inputs) {
    for (int64_t at = 0; at < outputs; at += WIDE) {
        int64_t width = width_at(at, outputs);
        for (int64_t i = 0; i < rows; i += HIGH)
            sized(rows - i, width, [&](auto r, auto v) {
                rows_product<r.value, v.value>(x + i, packed, out + i, at, inputs);
            });
        packed += width * inputs;
    }
}

// Rows from .. to of columns at .. at + 64 of out[H, N] (+)= left.T right, of n rows of both.
static void gradient_of_rows(const float* const* left, int64_t from, int64_t to,
                             const float* const* right, int64_t at, int64_t n, float* out,
                             int64_t ld, bool add) {
    for (int64_t up = from; up < to; up += HIGH)
        sized(to - up, width_at(at, ld), [&](auto r, auto v) {
            sum_of_products<r.value, v.value>(left, up, right, at, n, out + up * ld + at, ld, add);
        });
}
