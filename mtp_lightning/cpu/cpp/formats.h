// The formats of weights that are packed for skinny GEMMs: products with few rows, limited by reading the
// weights from memory.
//
// Weights are packed in panels of WIDE outputs: the numbers of an input, or of a few adjacent ones, are
// together for all outputs, so that a panel is one stream and no sum runs across lanes.
//
// Shapes: M rows, N outputs, K inputs, R rows of a tile, V vectors of outputs of a panel.
#pragma once

#include "tile.h"

constexpr int64_t PANEL = WIDE;

// The formats of a packed weight.
enum Kind : int64_t { FULL, BF16, BYTE, BLOCKS4, BLOCKS8, BLOCKS4_FULL, BLOCKS8_FULL, FP16 };
// Added to the kind of a weight in blocks whose products are of integers (integer.h).
constexpr int64_t INTEGER = 256;

static inline Vector lower_half(Whole x) { return (Vector)(x << 16); }
static inline Vector upper_half(Whole x) { return (Vector)(x & (int32_t)0xffff0000); }

// Reading a panel is a stream. Intel's hardware prefetcher stops at the end of every page of 4 KB, so
// panels are prefetched this many bytes ahead. That cost a tenth on Zen 4; on Zen 3, bf16 products
// took 0.85 and integer products 0.75 of the time.
static const int64_t PREFETCH_BYTES = __builtin_cpu_is("intel") ? 8192 : LANES == 8 ? 2048 : 0;

static inline void prefetch(const char* from) { __builtin_prefetch(from + PREFETCH_BYTES); }

// Keeps the compiler from reading memory before the statements above are done. With 16 registers, it
// otherwise unpacks so many weights in advance that the sums do not fit into registers.
INLINE void read_in_order() {
    if constexpr (REGISTERS == 16) __asm__ volatile("" ::: "memory");
}

static inline Whole load_whole(const char* from) { return *(const LooseWhole*)from; }

// A format has UNIT, the vectors of outputs that are stored together; the bytes of a panel; and
// each<V>(panel, inputs, body), which calls body(k, weight[V]) for every input k. Where it is SCALED,
// weight is to be multiplied by scale<V>(panel, v). Formats that are not in blocks read P adjacent panels
// of V / P vectors at once: each<V, P>.

// Where vector v of an input is; panels of `size` bytes have W vectors of `bytes` each.
template <int W>
INLINE const char* vector_of(const char* panel, int64_t size, int v, int64_t bytes) {
    return panel + v / W * size + v % W * bytes;
}

struct Full {
    static constexpr int UNIT = 1;
    static constexpr bool SCALED = false, IN_BLOCKS = false;
    static int64_t bytes(int64_t width, int64_t inputs) { return width * inputs * sizeof(float); }
    template <int V, int P = 1, bool PREFETCHES = false, typename Body>
    INLINE void each(const char* panel, int64_t inputs, Body body) {
        int64_t size = bytes(PANEL, inputs);
        for (int64_t k = 0; k < inputs; k++, panel += V / P * sizeof(Vector)) {
            Vector weight[V];
            times<V>(BODY(int v) {
                const char* from = vector_of<V / P>(panel, size, v, sizeof(Vector));
                if (PREFETCHES) prefetch(from);
                weight[v] = load((const float*)from);
            });
            body(k, weight);
        }
    }
};

// bf16: a vector holds 2 LANES numbers, output i in the lower half and output i + LANES in the upper half
// of a lane.
struct Bf16 {
    static constexpr int UNIT = 2;
    static constexpr bool SCALED = false, IN_BLOCKS = false;
    static int64_t bytes(int64_t width, int64_t inputs) { return width * inputs * 2; }
    template <int V, int P = 1, typename Body>
    INLINE void each(const char* panel, int64_t inputs, Body body) {
        int64_t size = bytes(PANEL, inputs);
        for (int64_t k = 0; k < inputs; k++, panel += V / P * sizeof(Vector) / 2) {
            Vector weight[V];
            times<V / 2>(BODY(int v) {
                const char* from = vector_of<V / P / 2>(panel, size, v, sizeof(Vector));
                prefetch(from);
                Whole pair = load_whole(from);
                weight[2 * v] = lower_half(pair), weight[2 * v + 1] = upper_half(pair);
            });
            body(k, weight);
        }
    }
};

// fp16. Two vectors are prefetched at once: with AVX-512, a line of 64 bytes.
struct Fp16 {
    static constexpr int UNIT = 1;
    static constexpr bool SCALED = false, IN_BLOCKS = false;
    static int64_t bytes(int64_t width, int64_t inputs) { return width * inputs * 2; }
    template <int V, int P = 1, typename Body>
    INLINE void each(const char* panel, int64_t inputs, Body body) {
        int64_t size = bytes(PANEL, inputs);
        for (int64_t k = 0; k < inputs; k++, panel += V / P * LANES * 2) {
            Vector weight[V];
            times<V>(BODY(int v) {
                const char* from = vector_of<V / P>(panel, size, v, LANES * 2);
                if (v % 2 == 0) prefetch(from);
                weight[v] = load_fp16(from);
            });
            body(k, weight);
        }
    }
};

// int8: weight = number x scale of its output. The scales are the first vectors of a panel.
struct Byte {
    static constexpr int UNIT = 1;
    static constexpr bool SCALED = true, IN_BLOCKS = false;
    static int64_t bytes(int64_t width, int64_t inputs) { return width * (inputs + sizeof(float)); }
    INLINE Vector scale(const char* panel, int v) { return load((const float*)panel + v * LANES); }
    template <int V, int P = 1, typename Body>
    INLINE void each(const char* panel, int64_t inputs, Body body) {
        int64_t size = bytes(PANEL, inputs);
        panel += V / P * sizeof(Vector);
        for (int64_t k = 0; k < inputs; k++, panel += V / P * LANES) {
            Vector weight[V];
            times<V>(BODY(int v) {
                const char* from = vector_of<V / P>(panel, size, v, LANES);
                if (v % (V / P) == 0) prefetch(from);
                weight[v] = load_bytes((const int8_t*)from);
            });
            body(k, weight);
        }
    }
};

// The steps and offsets of the blocks of LANES outputs in fp16: one vector.
struct HalfScales {
    static constexpr int SIZE = 1;
    INLINE Vector step(const char* from) { return load_fp16(from); }
    INLINE Vector offset(const char* from) { return load_fp16(from + sizeof(Vector) / 2); }
};

// The same in fp32: two vectors.
struct FullScales {
    static constexpr int SIZE = 2;
    INLINE Vector step(const char* from) { return (Vector)load_whole(from); }
    INLINE Vector offset(const char* from) { return (Vector)load_whole(from + sizeof(Vector)); }
};

// Blocks of GROUP inputs of an output: weight = step x q + offset with q of BITS bits. With fp16 scales
// they are those of GGUF's Q4_0, Q4_1 and Q8_0; with fp32 scales those of Q4_K, Q5_K and Q6_K, whose
// steps and offsets are products. A block is the scales for every LANES outputs, then GROUP BITS / 32
// times V vectors, whose lanes hold 32 / BITS inputs of one output.
//
// q becomes the fraction of 1.q, so that no conversion is needed: with a = 2^BITS step, weight =
// a x 1.q + (offset - a), rounded once. Packing refuses weights where that is not exact.
template <int BITS_, int64_t GROUP_, typename Scales>
struct Blocks {
    using SCALES = Scales;
    static constexpr int BITS = BITS_;
    static constexpr int64_t GROUP = GROUP_;
    static constexpr int VECTORS = GROUP * BITS / 32;
    static constexpr int UNIT = 1;
    static constexpr bool SCALED = false, IN_BLOCKS = true;
    static constexpr int IN_LANE = 32 / BITS;
    static constexpr float LEVELS = 1 << BITS;
    static int64_t bytes(int64_t width, int64_t inputs) {
        return inputs / GROUP * width * (Scales::SIZE + VECTORS) * 4;
    }
    // 1.q of the lanes' number j.
    INLINE Vector fraction(Whole lanes, int j) {
        int left = 23 - BITS - j * BITS;
        Whole moved = left > 0 ? lanes << left : lanes >> -left;
        return (Vector)masked_or(moved, ((1 << BITS) - 1) << (23 - BITS), 0x3f800000);
    }
    template <int V, int = 1, typename Body>
    INLINE void each(const char* panel, int64_t inputs, Body body) {
        for (int64_t k = 0; k < inputs; k += GROUP) {
            Vector step[V], offset[V];
            times<V>(BODY(int v) {
                const char* from = panel + v * Scales::SIZE * sizeof(Vector);
                times<Scales::SIZE>(BODY(int i) { prefetch(from + i * sizeof(Vector)); });
                step[v] = Scales::step(from) * broadcast(LEVELS);
                offset[v] = Scales::offset(from) - step[v];
            });
            panel += V * Scales::SIZE * sizeof(Vector);
            for (int i = 0; i < VECTORS; i++, panel += V * sizeof(Vector)) {
                times<V>(BODY(int v) { prefetch(panel + v * sizeof(Vector)); });
                times<IN_LANE>(BODY(int j) {
                    Vector weight[V];
                    times<V>(BODY(int v) {
                        Whole lanes = load_whole(panel + v * sizeof(Vector));
                        weight[v] = multiply_add(step[v], fraction(lanes, j), offset[v]);
                    });
                    body(k + i * IN_LANE + j, weight);
                    read_in_order();
                });
            }
        }
    }
};

using Blocks4 = Blocks<4, 32, HalfScales>;
using Blocks8 = Blocks<8, 32, HalfScales>;
using Blocks4Full = Blocks<4, 32, FullScales>;
using Blocks8Full = Blocks<8, 16, FullScales>;

// Calls body with the format of a kind.
template <typename Body>
static inline auto as_format(int64_t kind, Body body) {
    switch (kind & ~INTEGER) {
        case FULL: return body(Full{});
        case BF16: return body(Bf16{});
        case BYTE: return body(Byte{});
        case BLOCKS4: return body(Blocks4{});
        case BLOCKS8: return body(Blocks8{});
        case BLOCKS4_FULL: return body(Blocks4Full{});
        case BLOCKS8_FULL: return body(Blocks8Full{});
        default: return body(Fp16{});
    }
}

// The width of a panel: its outputs, rounded up to whole vectors (in bf16 to pairs of them).
template <typename Format>
static inline int64_t panel_width(int64_t outputs) {
    int64_t unit = Format::UNIT * LANES;
    return least(PANEL, (outputs + unit - 1) / unit * unit);
}

// A packed weight.
struct Packed {
    const void* data;
    int64_t kind;
};

// With fewer multiply-adds, starting a thread costs more than it saves.
constexpr int64_t WORTH_THREADS = 1 << 18;

// Stores the sums of up to LANES outputs, of which `left` are there, or adds them.
INLINE void store_sum(float* to, Vector sum, int64_t left, bool add) {
    if (left >= LANES)
        store(to, add ? load(to) + sum : sum);
    else if (left > 0)
        store_some(to, add ? load_some(to, left) + sum : sum, left);
}
