// Products with few rows on the left: a read of the weights, at the memory's rate.
//
// Weights are packed by panels of 64 outputs: for every input the 64 numbers side by side, so that a
// panel is one stream and no sum runs across lanes. In bf16 a vector holds 32 of them: outputs i in
// the lower halves, i + 16 in the upper ones. In int8 (weight = scale of its output x number) the scales
// of all outputs come first. Every output is one chain of multiply-adds in the
// order of its inputs, whatever other rows are computed with it: the same bits in a pass of one row
// and of many.
//
// Shapes: M rows, N outputs, K inputs.
#pragma once

#include <type_traits>

#include "vector.h"

constexpr int64_t PANEL = 4 * LANES;

// What the numbers of a packed weight are.
enum Kind : int64_t { FULL, HALF, BYTE };

// A panel is as wide as its outputs, by vectors (in bf16 pairs of them).
static inline int64_t panel_width(int64_t outputs, int64_t kind) {
    int64_t unit = kind == HALF ? 2 * LANES : LANES;
    int64_t width = (outputs + unit - 1) / unit * unit;
    return width < PANEL ? width : PANEL;
}

static inline Vector lower_half(Whole x) { return (Vector)(x << 16); }
static inline Vector upper_half(Whole x) { return (Vector)(x & (int32_t)0xffff0000); }

typedef int32_t LooseWhole __attribute__((vector_size(64), aligned(4), may_alias));

template <typename Number>
constexpr int64_t KIND = sizeof(Number) == 4 ? FULL : sizeof(Number) == 2 ? HALF : BYTE;

// R rows times a panel of V vectors: out[R, 16 V] (+)= x[R, K] panel[K, 16 V]; `scales` of int8's outputs.
template <int R, int V, typename Number>
static inline void panel_rows(const float* x, int64_t inputs, const Number* panel,
                              const float* scales, float* out, int64_t outputs, int64_t n,
                              bool add) {
    Vector sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = all(0.0f);
    for (int64_t k = 0; k < inputs; k++, panel += V * LANES) {
        Vector weight[V];
        if constexpr (KIND<Number> == BYTE) {
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) weight[v] = load_bytes(panel + v * LANES);
        } else if constexpr (KIND<Number> == HALF) {
#pragma GCC unroll 2
            for (int v = 0; v < V; v += 2) {
                Whole pair = *(const LooseWhole*)(panel + v * LANES);
                weight[v] = lower_half(pair), weight[v + 1] = upper_half(pair);
            }
        } else {
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) weight[v] = load(panel + v * LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vector left = all(x[r * inputs + k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] = multiply_add(left, weight[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            if constexpr (KIND<Number> == BYTE) sum[r][v] *= load(scales + v * LANES);
            int64_t left = n - v * LANES;
            float* to = out + r * outputs + v * LANES;
            if (left >= LANES)
                store(to, add ? load(to) + sum[r][v] : sum[r][v]);
            else if (left > 0)
                store_some(to, add ? load_some(to, left) + sum[r][v] : sum[r][v], left);
        }
}

constexpr int64_t ROWS_AT_ONCE = 6;  // 6 x 4 sums and 4 weights: what the registers hold

template <int V, typename Number>
static void panel_product(const float* x, int64_t rows, int64_t inputs, const Number* panel,
                          const float* scales, float* out, int64_t outputs, int64_t n, bool add) {
    auto at_once = [&](auto count) {
        constexpr int R = decltype(count)::value;
        panel_rows<R, V>(x, inputs, panel, scales, out, outputs, n, add);
    };
    while (rows > 0) {
        int64_t r = rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE;
        switch (r) {
            case 1: at_once(std::integral_constant<int, 1>()); break;
            case 2: at_once(std::integral_constant<int, 2>()); break;
            case 3: at_once(std::integral_constant<int, 3>()); break;
            case 4: at_once(std::integral_constant<int, 4>()); break;
            case 5: at_once(std::integral_constant<int, 5>()); break;
            default: at_once(std::integral_constant<int, ROWS_AT_ONCE>());
        }
        rows -= r, x += r * inputs, out += r * outputs;
    }
}

// Below so many multiply-adds starting a thread costs more than it brings.
constexpr int64_t WORTH_THREADS = 1 << 18;

// out[M, N] (+)= x[M, K] weight.T, of a packed weight.
template <typename Number>
static void skinny(const float* x, const Number* weight, const float* scales, float* out,
                     int64_t rows, int64_t outputs, int64_t inputs, bool add) {
    int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) if (rows * outputs * inputs > WORTH_THREADS)
    for (int64_t p = 0; p < panels; p++) {
        int64_t n = outputs - p * PANEL;
        auto of_width = [&](auto vectors) {
            constexpr int V = decltype(vectors)::value;
            panel_product<V>(x, rows, inputs, weight + p * PANEL * inputs, scales + p * PANEL,
                             out + p * PANEL, outputs, n, add);
        };
        switch (panel_width(n, KIND<Number>) / LANES) {
            case 1:
                if constexpr (KIND<Number> != HALF) of_width(std::integral_constant<int, 1>());
                break;
            case 2: of_width(std::integral_constant<int, 2>()); break;
            case 3:
                if constexpr (KIND<Number> != HALF) of_width(std::integral_constant<int, 3>());
                break;
            default: of_width(std::integral_constant<int, 4>());
        }
    }
}

// Outputs of all panels, whose scales stand before int8's numbers.
static inline int64_t padded(int64_t outputs) { return (outputs + LANES - 1) / LANES * LANES; }

static inline void skinny(const float* x, const void* weight, int64_t kind, float* out,
                            int64_t rows, int64_t outputs, int64_t inputs, bool add) {
    const float* scales = (const float*)weight;
    if (kind == BYTE)
        skinny(x, (const int8_t*)(scales + padded(outputs)), scales, out, rows, outputs, inputs, add);
    else if (kind == HALF)
        skinny(x, (const uint16_t*)weight, scales, out, rows, outputs, inputs, add);
    else
        skinny(x, (const float*)weight, scales, out, rows, outputs, inputs, add);
}
