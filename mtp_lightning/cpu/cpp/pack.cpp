// Packs weights into the panels of formats.h, and unpacks them. Packing reads and writes
// the weights once: tiles of LANES x LANES are transposed in registers.
#include <sys/mman.h>

#include <atomic>
#include <vector>

#include "unpack.h"

// The digest of the sources, set by setup.py.
extern "C" const char* built_from() { return BUILT_FROM; }

// Bytes of a packed weight.
extern "C" int64_t packed_size(int64_t outputs, int64_t inputs, int64_t kind) {
    return as_format(kind, [&](auto format) {
        using Format = decltype(format);
        int64_t panels = (outputs - 1) / PANEL, rest = outputs - panels * PANEL;
        return panels * Format::bytes(PANEL, inputs) +
               Format::bytes(panel_width<Format>(rest), inputs);
    });
}

// Asks for huge pages, which are filled faster and need fewer address translations when read.
static void large_pages(void* memory, int64_t bytes) {
    constexpr uintptr_t page = 1 << 21;
    uintptr_t begin = ((uintptr_t)memory + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)memory + bytes) / page * page;
    if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
}

// Packs panel by panel: body(panel, first output, width).
template <typename Format, typename Body>
static void for_panels(char* packed, int64_t outputs, int64_t inputs, Body body) {
    int64_t panels = (outputs + PANEL - 1) / PANEL, size = Format::bytes(PANEL, inputs);
    large_pages(packed, panels * size);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++)
        body(packed + p * size, p * PANEL, panel_width<Format>(outputs - p * PANEL));
}

// Packs weight[N, K] in fp32.
static bool pack(Full, const float* weight, char* packed, int64_t outputs, int64_t inputs) {
    if (!packed) return true;
    for_panels<Full>(packed, outputs, inputs, [&](char* panel, int64_t at, int64_t width) {
        pack_panel(weight, (float*)panel, outputs, inputs, at, width);
    });
    return true;
}

// Whether bf16 represents all numbers exactly.
static bool halves(const float* numbers, int64_t n) {
    const Whole lower = 0xffff - (Whole){};
    for (int64_t i = 0; i < n; i += 64 * LANES) {
        Whole bits = {};
        for (int64_t j = i; j < i + 64 * LANES && j < n; j += LANES)
            bits |= (Whole)(n - j < LANES ? load_some(numbers + j, n - j) : load(numbers + j));
        if (any(bits & lower)) return false;
    }
    return true;
}

// Packs in bf16, if bf16 represents all numbers exactly.
static bool pack(Bf16, const float* weight, char* packed, int64_t outputs, int64_t inputs) {
    if (!halves(weight, packed ? outputs * inputs : inputs)) return false;
    if (!packed) return true;
    const Whole upper = (int32_t)0xffff0000 - (Whole){};
    for_panels<Bf16>(packed, outputs, inputs, [&](char* panel, int64_t at, int64_t width) {
        for (int64_t j = 0; j < width; j += 2 * LANES)
            for (int64_t k = 0; k < inputs; k += LANES) {
                Vector first[LANES], second[LANES];
                tile_of(weight, outputs, inputs, at + j, k, first);
                tile_of(weight, outputs, inputs, at + j + LANES, k, second);
                for (int64_t i = 0; i < LANES && k + i < inputs; i++) {
                    Whole low = ((Whole)first[i] >> 16) & ~upper;
                    store((float*)((uint16_t*)panel + (k + i) * width + j),
                          (Vector)(low | ((Whole)second[i] & upper)));
                }
            }
    });
    return true;
}

// Packs in fp16, if fp16 represents all numbers exactly.
static bool pack(Fp16, const float* weight, char* packed, int64_t outputs, int64_t inputs) {
    Whole lost = {};
    columns(packed ? outputs * inputs : inputs, [&](int64_t at, int64_t n) {
        Vector number = take(weight + at, n);
        char half[2 * LANES];
        store_fp16(half, number);
        lost |= (Whole)load_fp16(half) != (Whole)number;  // bits, since denormals may count as 0
    });
    if (any(lost)) return false;
    if (!packed) return true;
    for_panels<Fp16>(packed, outputs, inputs, [&](char* panel, int64_t at, int64_t width) {
        for (int64_t j = 0; j < width; j += LANES)
            for (int64_t k = 0; k < inputs; k += LANES) {
                Vector rows[LANES];
                tile_of(weight, outputs, inputs, at + j, k, rows);
                for (int64_t i = 0; i < LANES && k + i < inputs; i++)
                    store_fp16(panel + ((k + i) * width + j) * 2, rows[i]);
            }
    });
    return true;
}

// The step of which all numbers of an output are integer multiples, the largest 127 times; 0 if they
// are all 0, and -1 if there is no such step, as for NaN and infinity.
static float step_of(const float* numbers, int64_t n) {
    Vector largest = broadcast(0.0f);
    columns(n, [&](int64_t at, int64_t m) { largest = larger(absolute(take(numbers + at, m)), largest); });
    float step = max_lane(largest) / 127.0f;
    Whole lost = {};
    columns(n, [&](int64_t at, int64_t m) {
        Vector number = take(numbers + at, m);
        Vector whole = step > 0.0f ? rounded(number / broadcast(step)) : broadcast(0.0f);
        lost |= multiply_add(whole, broadcast(step), -number) != broadcast(0.0f);  // also true for NaN
    });
    return any(lost) ? -1.0f : step;
}

// Packs in int8, if every output has a step that represents its numbers exactly.
static bool pack(Byte, const float* weight, char* packed, int64_t outputs, int64_t inputs) {
    std::vector<float> steps(padded(outputs));
    for (int64_t o = 0; o < (packed ? outputs : 1); o++)
        if ((steps[o] = step_of(weight + o * inputs, inputs)) < 0.0f) return false;
    if (!packed) return true;
    for_panels<Byte>(packed, outputs, inputs, [&](char* panel, int64_t at, int64_t width) {
        memcpy(panel, &steps[at], width * sizeof(float));
        int8_t* to = (int8_t*)(panel + width * sizeof(float));
        for (int64_t j = 0; j < width; j += LANES) {
            Vector step = load(&steps[at + j]);
            for (int64_t k = 0; k < inputs; k += LANES) {
                Vector rows[LANES];
                tile_of(weight, outputs, inputs, at + j, k, rows);
                for (int64_t i = 0; i < LANES && k + i < inputs; i++)
                    store_bytes(to + (k + i) * width + j,
                                integers(step > broadcast(0.0f) ? rows[i] / step : step));
            }
        }
    });
    return true;
}

static inline float as_fp16(float x) { return _cvtsh_ss(_cvtss_sh(x, 0)); }

// A block of one output as step x q + offset.
template <typename Format>
struct Fitted {
    static constexpr int BITS = Format::BITS;
    float step, offset;
    int32_t q[Format::GROUP];

    // Takes a step and an offset, if they give all numbers exactly.
    bool fits(const float* numbers, float given_step, float given_offset) {
        step = given_step, offset = given_offset;
        Vector a = broadcast(step) * broadcast(Format::LEVELS), b = broadcast(offset) - a;
        Whole lost = {};
        for (int64_t i = 0; i < Format::GROUP; i += LANES) {
            Vector number = load(numbers + i);
            Vector level = step == 0.0f
                               ? broadcast(0.0f)
                               : rounded((number - broadcast(offset)) / broadcast(step));
            lost |= ~(level >= broadcast(0.0f)) | (level >= broadcast(Format::LEVELS));
            Vector fraction = multiply_add(level, broadcast(1 / Format::LEVELS), broadcast(1.0f));
            lost |= multiply_add(a, fraction, b) != number;  // also true for NaN
            store((float*)q + i, (Vector)integers(level));
        }
        return !any(lost);
    }

    // Finds a step and an offset in fp16, if there are any. Inlined, it makes packing 5 % slower.
    __attribute__((noinline)) bool find(const float* numbers) {
        constexpr int TOP = (1 << BITS) - 1, ZERO = 1 << (BITS - 1);
        Vector top = load(numbers), bottom = -top;
        for (int64_t i = LANES; i < Format::GROUP; i += LANES) {
            top = larger(top, load(numbers + i));
            bottom = larger(bottom, -load(numbers + i));
        }
        float high = max_lane(top), low = -max_lane(bottom);
        float size = -low > high ? -low : high;
        auto fits = [&](float given_step, float given_offset) {
            return this->fits(numbers, as_fp16(given_step), as_fp16(given_offset));
        };
        // As Q8_0, step x i with |i| <= 127: the offset is -128 steps, and the level i + 128.
        if (BITS == 8 && fits(size / (ZERO - 1), -size / (ZERO - 1) * ZERO)) return true;
        // As Q4_1: the smallest number is the offset, the largest has the last level.
        if (fits((high - low) / TOP, low)) return true;
        // As Q4_0: the number of the largest size has the level 0, eight steps from 0.
        if (fits(size / ZERO, -size) || fits(-size / ZERO, size)) return true;
        if (low == high) {
            for (int n = 1; n <= ZERO; n++)
                if (fits(-low / n, low / n * ZERO) || fits(low / n, -low / n * ZERO)) return true;
            return false;
        }
        // An extreme, or with 4 bits a level beyond it, is the offset; not all levels are used.
        if (BITS == 8 && low != as_fp16(low) && high != as_fp16(high)) return false;
        for (int n = TOP; n > 0; n--) {
            float given = as_fp16((high - low) / n);
            for (int beyond = 0; beyond <= (BITS == 4 ? TOP - n : 0); beyond++) {
                if (fits(given, low - beyond * given)) return true;
                if (fits(-given, high + beyond * given)) return true;
            }
        }
        return false;
    }
};

static inline void put_scales(char* to, int64_t lane, float step, float offset, HalfScales) {
    ((uint16_t*)to)[lane] = _cvtss_sh(step, 0);
    ((uint16_t*)to)[LANES + lane] = _cvtss_sh(offset, 0);
}

static inline void put_scales(char* to, int64_t lane, float step, float offset, FullScales) {
    ((float*)to)[lane] = step;
    ((float*)to)[LANES + lane] = offset;
}

// Packs in blocks: fit(block, output, input) finds the block from an output's input on, and returns
// whether there is one.
template <typename Format, typename Fit>
static bool pack_blocks(char* packed, int64_t outputs, int64_t inputs, Fit fit) {
    std::atomic<bool> lost{false};
    for_panels<Format>(packed, outputs, inputs, [&](char* panel, int64_t at, int64_t width) {
        int64_t vectors = width / LANES, size = Format::bytes(width, Format::GROUP);
        int64_t scales = Format::SCALES::SIZE * sizeof(Vector);
        for (int64_t k = 0; k < inputs && !lost; k += Format::GROUP, panel += size) {
            memset(panel, 0, size);
            for (int64_t o = 0; o < width && at + o < outputs; o++) {
                Fitted<Format> block;
                if (!fit(block, at + o, k)) {
                    lost = true;
                    return;
                }
                int64_t v = o / LANES, lane = o % LANES;
                typename Format::SCALES kind;
                put_scales(panel + v * scales, lane, block.step, block.offset, kind);
                uint32_t* words = (uint32_t*)(panel + vectors * scales);
                for (int64_t i = 0; i < Format::GROUP; i++) {
                    int64_t word = i / Format::IN_LANE, shift = i % Format::IN_LANE * Format::BITS;
                    words[(word * vectors + v) * LANES + lane] |= (uint32_t)block.q[i] << shift;
                }
            }
        }
    });
    return !lost;
}

// Packs in blocks, if every 32 inputs of an output have a step and an offset in fp16 that represent
// them exactly.
template <int BITS>
static bool pack(Blocks<BITS, 32, HalfScales>, const float* weight, char* packed, int64_t outputs,
                 int64_t inputs) {
    using Format = Blocks<BITS, 32, HalfScales>;
    Fitted<Format> first;
    if (inputs % Format::GROUP || !first.find(weight)) return false;
    if (!packed) return true;
    return pack_blocks<Format>(packed, outputs, inputs, [&](auto& block, int64_t o, int64_t k) {
        return block.find(weight + o * inputs + k);
    });
}

// Steps and offsets in fp32 are not found in the numbers: pack_scaled is given them.
template <int BITS, int64_t GROUP>
static bool pack(Blocks<BITS, GROUP, FullScales>, const float*, char*, int64_t, int64_t) {
    return false;
}

// Packs weight[N, K] in a format. Returns 0, with unusable content in `packed`, if the format does not
// represent all numbers exactly. Without `packed` it only looks at the numbers of the first output or
// block: most weights do not fit most formats, which is known before memory for one is taken.
extern "C" int64_t pack_weight(const float* weight, char* packed, int64_t outputs, int64_t inputs,
                               int64_t kind) {
    return as_format(kind,
                     [&](auto format) { return pack(format, weight, packed, outputs, inputs); });
}

// The same of BLOCKS4_FULL or BLOCKS8_FULL with steps and offsets [N, K / GROUP].
extern "C" int64_t pack_scaled(const float* weight, const float* steps, const float* offsets,
                               char* packed, int64_t outputs, int64_t inputs, int64_t kind) {
    auto pack_as = [&](auto format) {
        using Format = decltype(format);
        int64_t groups = inputs / Format::GROUP;
        return pack_blocks<Format>(packed, outputs, inputs, [&](auto& block, int64_t o, int64_t k) {
            int64_t i = o * groups + k / Format::GROUP;
            return block.fits(weight + o * inputs + k, steps[i], offsets[i]);
        });
    };
    return kind == BLOCKS4_FULL ? pack_as(Blocks4Full{}) : pack_as(Blocks8Full{});
}

// out[N, K], the numbers of a packed weight.
extern "C" void unpack_weight(const char* packed, float* out, int64_t outputs, int64_t inputs,
                              int64_t kind) {
    as_format(kind, [&](auto format) {
        using Format = decltype(format);
        int64_t panels = (outputs + PANEL - 1) / PANEL, size = Format::bytes(PANEL, inputs);
#pragma omp parallel for schedule(static)
        for (int64_t p = 0; p < panels; p++)
            unpack_panel<Format>(packed + p * size, outputs - p * PANEL, inputs,
                                 [&](int64_t o, int64_t k, Vector numbers, int64_t n) {
                                     put(out + (p * PANEL + o) * inputs + k, numbers, n);
                                 });
    });
}

// out[n, K], the numbers of n outputs.
extern "C" void unpack_rows(const void* packed, const int64_t* ids, float* out, int64_t n,
                            int64_t outputs, int64_t inputs, int64_t kind) {
    for (int64_t i = 0; i < n; i++)
        unpack_row(Packed{packed, kind}, ids[i], out + i * inputs, outputs, inputs);
}
