// Local response normalisation and max-pooling of channels-last tensors on a processor, in one pass
// over memory each way. Built by native.py, which has the contract; float32 and bfloat16, computed
// in float32.

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

// Normalisation across neighbouring maps, beta 1/2, 3/4 or 1. A row is the maps of one column at one position;
// rows lie end to end. `rectify` applies ReLU to what is read, so that the tensor before ReLU is all
// that must be kept.

struct Norm {
    int maps, size, rectify, quarters;  // of beta: 2, 3 or 4
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

// s^-beta and 1/s for s = k + alpha * (sum of squares near each map).
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
            float root = 1.0f / std::sqrt(s), more = std::sqrt(root);
            more = norm.quarters == 3 ? more : norm.quarters == 4 ? root : 1.0f;
            block.power[r * maps + i] = root * more;
            block.inverse[r * maps + i] = root * root;
        }
    }
}

template <int SIZE, class T>
void forward(const T* x, T* y, int rows, const Norm& norm, Block& block) {
    powers<SIZE>(x, rows, norm, block);
    for (int i = 0; i < rows * norm.maps; i++) put(block.own[i] * block.power[i], y[i]);
}

// dL/da_i = g_i s_i^-b - 2 alpha b a_i * sum over j near i of g_j a_j s_j^(-b-1)
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
    const float factor = 0.5f * float(norm.quarters) * norm.alpha;
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

// Max-pooling of channels-last tensors. What is kept is the place in its window of each maximum,
// a byte; ties go to the first, as in torch, and not-a-number wins.

struct Pool {
    int maps, height, width, size, stride, rows, columns;  // rows x columns leave
};

// Not inline: gcc's unroll-and-jam of the loop around it undoes its vectors, 12 times slower.
template <class T>
__attribute__((noinline)) void take(const T* near, int k, float* best, int* where, int maps) {
    for (int i = 0; i < maps; i++) {
        const float a = get(near[i]), b = best[i];
        const int more = -int((a > b) | (a != a));  // all bits or none
        best[i] = more ? a : b;
        where[i] = (more & k) | (~more & where[i]);
    }
}

template <class T>
void pool_forward(const T* x, T* y, uint8_t* place, int64_t images, const Pool& p, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < images * p.rows; line++) {
        float best[BLOCK];
        int where[BLOCK];
        const T* top = x + (line / p.rows * p.height + line % p.rows * p.stride) * p.width * p.maps;
        for (int c = 0; c < p.columns; c++) {
            const T* first = top + int64_t(c) * p.stride * p.maps;
            const int64_t at = (line * p.columns + c) * p.maps;
            for (int i = 0; i < p.maps; i++) best[i] = get(first[i]), where[i] = 0;
            for (int k = 1; k < p.size * p.size; k++) {
                const T* near = first + (int64_t(k / p.size) * p.width + k % p.size) * p.maps;
                take(near, k, best, where, p.maps);
            }
            for (int i = 0; i < p.maps; i++) put(best[i], y[at + i]);
            for (int i = 0; i < p.maps; i++) place[at + i] = uint8_t(where[i]);
        }
    }
}

// The first of the windows that reach position `at` of a side.
inline int first_window(int at, const Pool& p) {
    return at < p.size ? 0 : (at - p.size) / p.stride + 1;
}

// Each place sums the gradients of the windows whose maximum it is: nothing is written twice.
template <class T>
void pool_backward(const T* grad, const uint8_t* place, T* out, int64_t images, const Pool& p,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < images * p.height; line++) {
        const int64_t n = line / p.height;
        const int y = int(line % p.height);
        float sum[BLOCK];
        for (int x = 0; x < p.width; x++) {
            T* to = out + (line * p.width + x) * p.maps;
            for (int i = 0; i < p.maps; i++) sum[i] = 0;
            for (int r = first_window(y, p); r <= y / p.stride && r < p.rows; r++) {
                for (int c = first_window(x, p); c <= x / p.stride && c < p.columns; c++) {
                    const int k = (y - r * p.stride) * p.size + x - c * p.stride;
                    const int64_t at = ((n * p.rows + r) * p.columns + c) * p.maps;
                    for (int i = 0; i < p.maps; i++)
                        sum[i] += place[at + i] == k ? get(grad[at + i]) : 0.0f;
                }
            }
            for (int i = 0; i < p.maps; i++) put(sum[i], to[i]);
        }
    }
}

}  // namespace

extern "C" {

// `grad` null: out = the normalised x; else out = dL/dx.
void lrn(const void* x, const void* grad, void* out, int64_t rows, int maps, int size,
         float k, float alpha, int quarters, int rectify, int half, int threads) {
    const Norm norm{maps, size, rectify, quarters, k, alpha};
    if (half) all((const Half*)x, (const Half*)grad, (Half*)out, rows, norm, threads);
    else all((const float*)x, (const float*)grad, (float*)out, rows, norm, threads);
}

void pool_forward(const void* x, void* y, void* place, int64_t images, const int* shape, int half,
                  int threads) {
    const Pool p{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
    if (half) pool_forward((const Half*)x, (Half*)y, (uint8_t*)place, images, p, threads);
    else pool_forward((const float*)x, (float*)y, (uint8_t*)place, images, p, threads);
}

void pool_backward(const void* grad, const void* place, void* out, int64_t images,
                   const int* shape, int half, int threads) {
    const Pool p{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
    const auto* of = (const uint8_t*)place;
    if (half) pool_backward((const Half*)grad, of, (Half*)out, images, p, threads);
    else pool_backward((const float*)grad, of, (float*)out, images, p, threads);
}
}
