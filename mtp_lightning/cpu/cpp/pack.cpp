// Packs weights into panels (skinny.h), in fp32, bf16 or int8. Packing reads and writes the weights
// once: tiles of 16 x 16 are transposed in registers.
#include <sys/mman.h>

#include "skinny.h"

// The digest of the sources, set by setup.py.
extern "C" const char* built_from() { return BUILT_FROM; }

// Size of a packed weight in numbers of its dtype; each of int8's scales takes four.
extern "C" int64_t packed_size(int64_t outputs, int64_t inputs, int64_t kind) {
    int64_t panels = (outputs - 1) / PANEL;
    int64_t numbers = (panels * PANEL + panel_width(outputs - panels * PANEL, kind)) * inputs;
    return kind == BYTE ? numbers + padded(outputs) * (int64_t)sizeof(float) : numbers;
}

// Asks for huge pages, which are filled faster and need fewer address translations when read.
static void large_pages(void* memory, int64_t bytes) {
    constexpr uintptr_t page = 1 << 21;
    uintptr_t begin = ((uintptr_t)memory + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)memory + bytes) / page * page;
    if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
}

// Inputs k .. k + 15 of outputs o .. o + 15, one vector per input; zeros beyond the weight's end.
static inline void tile_of(const float* weight, int64_t outputs, int64_t inputs, int64_t o,
                           int64_t k, Vector* rows) {
    int64_t n = inputs - k < LANES ? inputs - k : LANES;
    for (int64_t i = 0; i < LANES; i++) {
        const float* row = weight + (o + i) * inputs + k;
        rows[i] = o + i >= outputs ? all(0.0f) : n == LANES ? load(row) : load_some(row, n);
    }
    transpose(rows);
}

// Packs weight[N, K] in fp32. Returns 1.
extern "C" int64_t pack_full(const float* weight, float* packed, int64_t outputs, int64_t inputs) {
    large_pages(packed, packed_size(outputs, inputs, FULL) * sizeof(float));
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < (outputs + PANEL - 1) / PANEL; p++) {
        int64_t width = panel_width(outputs - p * PANEL, FULL);
        float* to = packed + p * PANEL * inputs;
        for (int64_t j = 0; j < width; j += LANES)
            for (int64_t k = 0; k < inputs; k += LANES) {
                Vector rows[LANES];
                tile_of(weight, outputs, inputs, p * PANEL + j, k, rows);
                for (int64_t i = 0; i < LANES && k + i < inputs; i++)
                    store(to + (k + i) * width + j, rows[i]);
            }
    }
    return 1;
}

// Whether bf16 represents all numbers exactly.
static bool halves(const float* numbers, int64_t n) {
    const Whole lower = 0xffff - (Whole){};
    for (int64_t i = 0; i < n; i += 64 * LANES) {
        Whole bits = {};
        for (int64_t j = i; j < i + 64 * LANES && j < n; j += LANES)
            bits |= (Whole)(n - j < LANES ? load_some(numbers + j, n - j) : load(numbers + j));
        bits &= lower;
        for (int64_t j = 0; j < LANES; j++)
            if (bits[j]) return false;
    }
    return true;
}

// Packs in bf16: two vectors of outputs share one of 32 numbers, the second in the upper halves.
// Returns 0, without packing, if bf16 does not represent all numbers exactly.
extern "C" int64_t pack_half(const float* weight, uint16_t* packed, int64_t outputs,
                             int64_t inputs) {
    if (!halves(weight, outputs * inputs)) return 0;
    const Whole upper = (int32_t)0xffff0000 - (Whole){};
    large_pages(packed, packed_size(outputs, inputs, HALF) * sizeof(uint16_t));
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < (outputs + PANEL - 1) / PANEL; p++) {
        int64_t width = panel_width(outputs - p * PANEL, HALF);
        uint16_t* to = packed + p * PANEL * inputs;
        for (int64_t j = 0; j < width; j += 2 * LANES)
            for (int64_t k = 0; k < inputs; k += LANES) {
                Vector first[LANES], second[LANES];
                tile_of(weight, outputs, inputs, p * PANEL + j, k, first);
                tile_of(weight, outputs, inputs, p * PANEL + j + LANES, k, second);
                for (int64_t i = 0; i < LANES && k + i < inputs; i++) {
                    Whole low = ((Whole)first[i] >> 16) & ~upper;
                    store((float*)(to + (k + i) * width + j),
                          (Vector)(low | ((Whole)second[i] & upper)));
                }
            }
    }
    return 1;
}

// The step of which all numbers of an output are integer multiples, the largest 127 times; 0 if they
// are all 0, and -1 if there is no such step, as for NaN and infinity.
static float step_of(const float* numbers, int64_t n) {
    Vector largest = all(0.0f);
    columns(n, [&](int64_t at, int64_t m) { largest = larger(size_of(take(numbers + at, m)), largest); });
    float step = largest_of(largest) / 127.0f;
    Whole lost = {};
    columns(n, [&](int64_t at, int64_t m) {
        Vector number = take(numbers + at, m);
        Vector whole = step > 0.0f ? rounded(number / all(step)) : all(0.0f);
        lost |= multiply_add(whole, all(step), -number) != all(0.0f);  // also true for NaN
    });
    for (int64_t j = 0; j < LANES; j++)
        if (lost[j]) return -1.0f;
    return step;
}

// Packs in int8, preceded by a scale for every output. Returns 0, with unusable content in `packed`,
// if int8 does not represent all numbers exactly.
extern "C" int64_t pack_byte(const float* weight, int8_t* packed, int64_t outputs, int64_t inputs) {
    float* scales = (float*)packed;
    memset(scales, 0, padded(outputs) * sizeof(float));
    for (int64_t o = 0; o < outputs; o++)
        if ((scales[o] = step_of(weight + o * inputs, inputs)) < 0.0f) return 0;
    int8_t* numbers = (int8_t*)(scales + padded(outputs));
    large_pages(packed, packed_size(outputs, inputs, BYTE));
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < (outputs + PANEL - 1) / PANEL; p++) {
        int64_t width = panel_width(outputs - p * PANEL, BYTE);
        int8_t* to = numbers + p * PANEL * inputs;
        for (int64_t j = 0; j < width; j += LANES) {
            Vector step = load(scales + p * PANEL + j);
            for (int64_t k = 0; k < inputs; k += LANES) {
                Vector rows[LANES];
                tile_of(weight, outputs, inputs, p * PANEL + j, k, rows);
                for (int64_t i = 0; i < LANES && k + i < inputs; i++)
                    store_bytes(to + (k + i) * width + j, step > all(0.0f) ? rows[i] / step : step);
            }
        }
    }
    return 1;
}
