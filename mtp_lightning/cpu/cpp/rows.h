// Products of rows given by pointers, so that no rows are gathered.
//
// All widths are multiples of 16. The right side is processed 64 columns at a time.
#pragma once

#include "vector.h"

static inline int64_t width_at(int64_t at, int64_t all_columns) {
    return all_columns - at < WIDE ? all_columns - at : WIDE;
}

// Packs weight[N, K] into panels of 64 outputs: the outputs of one input are adjacent.
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

// The same for a transposed weight, [K, N].
static void pack_turned(const float* weight, float* panel, int64_t outputs, int64_t inputs) {
    for (int64_t at = 0; at < outputs; at += WIDE) {
        int64_t width = width_at(at, outputs);
        for (int64_t k = 0; k < inputs; k++, panel += width)
            memcpy(panel, weight + k * outputs + at, width * sizeof(float));
    }
}

// out[r][at .. at + 16 V] = x[r][K] panel[K, 16 V] for R rows.
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

// out[R, 16 V] (+)= sum over n rows i of left[i][up .. up + R] right[i][at .. at + 16 V].
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
        __builtin_prefetch(x + LANES);  // needed by the next rows of `out`
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

// Rows from .. to and columns at .. at + 64 of out[H, N] (+)= left.T right, over n rows of both.
static void gradient_of_rows(const float* const* left, int64_t from, int64_t to,
                             const float* const* right, int64_t at, int64_t n, float* out,
                             int64_t ld, bool add) {
    for (int64_t up = from; up < to; up += HIGH)
        sized(to - up, width_at(at, ld), [&](auto r, auto v) {
            sum_of_products<r.value, v.value>(left, up, right, at, n, out + up * ld + at, ld, add);
        });
}
