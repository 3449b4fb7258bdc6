// Products of rows given by pointers, so that no rows are gathered.
//
// All widths are multiples of 16. The right side is processed WIDE columns at a time.
#pragma once

#include "tile.h"

static inline int64_t width_at(int64_t at, int64_t all_columns) {
    return least(WIDE, all_columns - at);
}

// Packs weight[N, K] into panels of WIDE outputs: the outputs of one input are adjacent.
static void pack_panels(const float* weight, float* panel, int64_t outputs, int64_t inputs) {
    for (int64_t at = 0; at < outputs; at += WIDE) {
        int64_t width = width_at(at, outputs);
        pack_panel(weight, panel, outputs, inputs, at, width);
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

// out[r][at ..] = x[r][K] panel[K], V vectors each, for R rows.
template <int R, int V>
static void rows_product(const float* const* x, const float* panel, float* const* out, int64_t at,
                         int64_t inputs) {
    auto to = BODY(int r) { return out[r] + at; };
    each_vector<R, V>(BODY(int r, int v) { __builtin_prefetch(to(r) + v * LANES, 1); });
    tile<R, V>(inputs, BODY(int r, int64_t k) { return x[r][k]; },
               BODY(int64_t k) { return panel + k * V * LANES; }, to, false);
}

// out[R] (+)= sum over n rows i of left[i][up .. up + R] right[i][at ..], V vectors each.
template <int R, int V>
static void sum_of_products(const float* const* left, int64_t up, const float* const* right,
                            int64_t at, int64_t n, float* out, int64_t ld, bool add) {
    auto wide = BODY(int64_t i) {
        __builtin_prefetch(left[i] + up + 16);  // needed by the next rows of `out`
        return right[i] + at;
    };
    tile<R, V>(n, BODY(int r, int64_t i) { return left[i][up + r]; }, wide,
               BODY(int r) { return out + r * ld; }, add);
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

// Rows from .. to and WIDE columns from `at` on of out[H, N] (+)= left.T right, over n rows of both.
static void gradient_of_rows(const float* const* left, int64_t from, int64_t to,
                             const float* const* right, int64_t at, int64_t n, float* out,
                             int64_t ld, bool add) {
    for (int64_t up = from; up < to; up += HIGH)
        sized(to - up, width_at(at, ld), [&](auto r, auto v) {
            sum_of_products<r.value, v.value>(left, up, right, at, n, out + up * ld + at, ld, add);
        });
}
