// Reads the numbers of a packed weight: the inverse of pack.cpp, to the last bit.
#pragma once

#include "formats.h"

// Calls write(o, k, numbers, n) for the outputs o of a panel, of which `left` are the weight's: the
// numbers of its inputs k .. k + n - 1, n <= LANES.
template <typename Format, typename Write>
static inline void unpack_panel(const char* panel, int64_t left, int64_t inputs, Write write) {
    sized(1, panel_width<Format>(left), [&](auto, auto v) {
        constexpr int V = v.value;
        if constexpr (V % Format::UNIT == 0) {
            Vector rows[V][LANES];
            Format::template each<V>(panel, inputs, BODY(int64_t k, auto& weight) {
                for (int u = 0; u < V; u++) {
                    rows[u][k % LANES] = weight[u];
                    if constexpr (Format::SCALED) rows[u][k % LANES] *= Format::scale(panel, u);
                }
                int64_t n = k % LANES + 1;
                if (n < LANES && k + 1 < inputs) return;
                for (int u = 0; u < V; u++) {
                    transpose(rows[u]);
                    for (int64_t i = 0; i < LANES && u * LANES + i < left; i++)
                        write(u * LANES + i, k + 1 - n, rows[u][i], n);
                }
            });
        }
    });
}

// out[K], the numbers of one output.
static inline void unpack_row(const Packed& weight, int64_t output, float* out, int64_t outputs,
                              int64_t inputs) {
    as_format(weight.kind, [&](auto format) {
        using Format = decltype(format);
        int64_t p = output / PANEL;
        unpack_panel<Format>((const char*)weight.data + p * Format::bytes(PANEL, inputs),
                             outputs - p * PANEL, inputs,
                             [&](int64_t o, int64_t k, Vector numbers, int64_t n) {
                                 if (p * PANEL + o == output) put(out + k, numbers, n);
                             });
    });
}
