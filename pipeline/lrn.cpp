// Local response normalisation over rows of maps, in one pass over memory each way: beta is 3/4.
//
// A row is the maps of one column at one position of a channels-last tensor; rows lie end to end.
// `rectify` applies ReLU to what is read, so that the tensor before ReLU is all that must be kept.
// Built by native.py, which has the contract; float32 and bfloat16, computed in float32.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int EDGE = 16;    // zeros before, between and after rows: at least size / 2
constexpr int BLOCK = 512;  // elements at a time, at least a row: what was just written is slow to
                            // read shifted, and four arrays must fit the first-level cache

struct Half {
    uint16_t bits;
};

inline float get(float x) { return x; }

inline float get(Half x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}

inline void put(float x, float& to) { to = x; }

inline void put(float x, Half& to) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    uint32_t even = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
    to.bits = x == x ? uint16_t(even) : uint16_t(0x7FC0);
}

struct Norm {
    int maps, size, rectify;
    float k, alpha;
};

// Some rows at a time, in the first-level cache. `near` has them apart, with zeros between.
struct Block {
    float own[BLOCK], power[BLOCK], inverse[BLOCK], near[EDGE + BLOCK * (1 + EDGE)];
};

template <int SIZE>
inline float window(const float* near, int size) {
    float sum = 0;
    for (int d = 0; d < (SIZE ? SIZE : size); d++) sum += near[d];
    return sum;
}

template <class T>
inline float read(T x, const Norm& norm) {
    float a = get(x);
    return norm.rectify && a < 0 ? 0.0f : a;  // not-a-number stays
}

// s^-3/4 and 1/s for s = k + alpha * (sum of squares near each map).
template <int SIZE, class T>
inline void powers(const T* x, int rows, const Norm& norm, Block& block) {
    const int maps = norm.maps, step = maps + EDGE;
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < maps; i++) {
            float a = read(x[r * maps + i], norm);
            block.own[r * maps + i] = a;
            block.near[r * step + EDGE + i] = a * a;
        }
    }
    for (int r = 0; r < rows; r++) {
        const float* first = block.near + r * step + EDGE - norm.size / 2;
        for (int i = 0; i < maps; i++) {
            float s = norm.k + norm.alpha * window<SIZE>(first + i, norm.size);
            float root = 1.0f / std::sqrt(s);
            block.power[r * maps + i] = root * std::sqrt(root);
            block.inverse[r * maps + i] = root * root;
        }
    }
}

template <int SIZE, class T>
void forward(const T* x, T* y, int rows, const Norm& norm, Block& block) {
    powers<SIZE>(x, rows, norm, block);
    for (int i = 0; i < rows * norm.maps; i++) put(block.own[i] * block.power[i], y[i]);
}

// dL/da_i = g_i s_i^-3/4 - 3/2 alpha a_i * sum over j near i of g_j a_j s_j^-7/4
template <int SIZE, class T>
void backward(const T* x, const T* grad, T* out, int rows, const Norm& norm, Block& block) {
    const int maps = norm.maps, step = maps + EDGE;
    powers<SIZE>(x, rows, norm, block);
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < maps; i++) {
            const int at = r * maps + i;
            block.power[at] *= get(grad[at]);
            block.near[r * step + EDGE + i] = block.inverse[at] * block.power[at] * block.own[at];
        }
    }
    const float factor = 1.5f * norm.alpha;
    for (int r = 0; r < rows; r++) {
        const float* first = block.near + r * step + EDGE - norm.size / 2;
        for (int i = 0; i < maps; i++) {
            const int at = r * maps + i;
            float own = block.own[at];
            float d = block.power[at] - factor * own * window<SIZE>(first + i, norm.size);
            put(norm.rectify && own == 0 ? 0.0f : d, out[at]);
        }
    }
}

template <class T>
void all(const T* x, const T* grad, T* out, int64_t rows, const Norm& norm, int threads) {
    const int many = BLOCK / norm.maps;
    const int64_t blocks = (rows + many - 1) / many;
#pragma omp parallel num_threads(threads)
    {
        Block block;
        std::memset(block.near, 0, sizeof block.near);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t at = b * many * norm.maps;
            const int n = int(rows - b * many < many ? rows - b * many : many);
            if (!grad && norm.size == 5) forward<5>(x + at, out + at, n, norm, block);
            else if (!grad) forward<0>(x + at, out + at, n, norm, block);
            else if (norm.size == 5) backward<5>(x + at, grad + at, out + at, n, norm, block);
            else backward<0>(x + at, grad + at, out + at, n, norm, block);
        }
    }
}

}  // namespace

// `grad` null: out = the normalised x; else out = dL/dx.
extern "C" void lrn(const void* x, const void* grad, void* out, int64_t rows, int maps, int size,
                    float k, float alpha, int rectify, int half, int threads) {
    const Norm norm{maps, size, rectify, k, alpha};
    if (half) all((const Half*)x, (const Half*)grad, (Half*)out, rows, norm, threads);
    else all((const float*)x, (const float*)grad, (float*)out, rows, norm, threads);
}
