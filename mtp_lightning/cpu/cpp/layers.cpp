// The layers between the matrices, each in one or two passes over memory where PyTorch's operators
// need several: RMSNorm, the gate of SwiGLU, softmax over a vocabulary.
//
// Rows are independent; only the gradient of a norm's gain is a sum over rows, in parts that do not
// depend on the number of threads.
#include "vector.h"

// out[M, F] = silu(gate) * up, the halves of the rows of gate_up[M, 2 F].
extern "C" void swiglu_forward(const float* gate_up, float* out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float* gate = gate_up + i * 2 * width;
        columns(width, [&](int64_t at, int64_t n) {
            Vector g = take(gate + at, n);
            put(out + i * width + at, g * sigmoid(g) * take(gate + width + at, n), n);
        });
    }
}

extern "C" void swiglu_backward(const float* gate_up, const float* grad, float* d_gate_up,
                                int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float* gate = gate_up + i * 2 * width;
        float* d_gate = d_gate_up + i * 2 * width;
        columns(width, [&](int64_t at, int64_t n) {
            Vector g = take(gate + at, n), u = take(gate + width + at, n);
            Vector d = take(grad + i * width + at, n), s = sigmoid(g);
            put(d_gate + width + at, d * g * s, n);
            put(d_gate + at, gate_gradient(d, g, u, s), n);
        });
    }
}

// out = x / sqrt(mean(x^2) + eps) * gain; scale is [M].
extern "C" void norm_forward(const float* x, const float* gain, float* out, float* scale,
                             int64_t rows, int64_t width, double eps) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float* row = x + i * width;
        Vector squares = broadcast(0.0f);
        columns(width, [&](int64_t at, int64_t n) {
            Vector v = take(row + at, n);
            squares += v * v;
        });
        scale[i] = (float)(1.0 / sqrt((double)sum_lanes(squares) / width + eps));
        columns(width, [&](int64_t at, int64_t n) {
            put(out + i * width + at, take(row + at, n) * broadcast(scale[i]) * take(gain + at, n), n);
        });
    }
}

constexpr int64_t PART = 64;  // rows whose gradient of the gain is summed in one row of `parts`

// d_x = (grad * gain - unit * mean(grad * gain * unit)) * scale
extern "C" void norm_backward(const float* x, const float* gain, const float* scale,
                              const float* grad, float* d_x, float* parts, int64_t rows,
                              int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < (rows + PART - 1) / PART; part++) {
        float* d_gain = parts + part * width;
        memset(d_gain, 0, width * sizeof(float));
        for (int64_t i = part * PART; i < rows && i < (part + 1) * PART; i++) {
            const float *row = x + i * width, *g = grad + i * width;
            Vector factor = broadcast(scale[i]), total = broadcast(0.0f);
            columns(width, [&](int64_t at, int64_t n) {
                Vector along = take(g + at, n) * take(row + at, n) * factor;
                put(d_gain + at, take(d_gain + at, n) + along, n);
                total += along * take(gain + at, n);
            });
            Vector mean = broadcast(sum_lanes(total) / width);
            columns(width, [&](int64_t at, int64_t n) {
                Vector unit = take(row + at, n) * factor;
                Vector d = take(g + at, n) * take(gain + at, n) - unit * mean;
                put(d_x + i * width + at, d * factor, n);
            });
        }
    }
}

// log-softmax of every row, in place.
extern "C" void log_softmax(float* x, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float* row = x + i * width;
        Vector top = broadcast(-INFINITY);
        columns(width, [&](int64_t at, int64_t n) {
            Vector v = n == LANES ? load(row + at) : load_some(row + at, n, -INFINITY);
            top = larger(v, top);
        });
        Vector shift = broadcast(max_lane(top));
        double total = 0.0;
        Vector sum = broadcast(0.0f);
        columns(width, [&](int64_t at, int64_t n) {
            if (n == LANES)
                sum += exp_of(load(row + at) - shift);
            else
                for (int64_t j = 0; j < n; j++) total += expf(row[at + j] - shift[0]);
        });
        total += sum_lanes(sum);
        shift += broadcast((float)log(total));
        columns(width, [&](int64_t at, int64_t n) {
            put(row + at, take(row + at, n) - shift, n);
        });
    }
}

// exp of all numbers, in place.
extern "C" void exponential(float* x, int64_t numbers) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (numbers + 4095) / 4096; block++) {
        float* from = x + block * 4096;
        int64_t n = least(4096, numbers - block * 4096);
        columns(n, [&](int64_t at, int64_t m) { put(from + at, exp_of(take(from + at, m)), m); });
    }
}
