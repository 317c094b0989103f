// Matrix products with packed weights: one tile of 32 tokens by 32 output features at a time.
//
// Every output sums its inputs in one fixed order, whatever the number of tokens beside it and
// wherever the input range is cut, so a token's result does not depend on its batch.
#pragma once

#include <type_traits>

#include "simd.h"
#include "types.h"

namespace paceline {
namespace PACELINE_ISA {

// Results of a tile product, [tokens][32]; int32 while the weight is int8.
union alignas(64) Tile {
  float f32[kRowBlock][kPanel];
  int32_t i32[kRowBlock][kPanel];
};

#if defined(__AMX_TILE__)
constexpr int kWords = 16;  // types.h, PackedWeight
#else
constexpr int kWords = 1;
#endif

#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 12;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kRowsAtOnce = 3;
#else
constexpr int kRowsAtOnce = 1;
#endif

// Weights are asked for so many bytes before they are used. Arithmetic on several tokens fills the
// core's window with so few loads that memory would be waited for otherwise.
constexpr int kAhead = 2048;

constexpr int kColumns = kPanel / kNative;  // registers that hold a panel's outputs

template <int R, typename V>
struct Sums {
  V v[R][kColumns];

  template <typename T>
  Sums(const T (*c)[kPanel], bool accumulate) {
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < kColumns; ++n) v[r][n] = accumulate ? load_as<V>(c[r] + n * kNative) : V{};
    }
  }

  template <typename T>
  void write(T (*c)[kPanel]) const {
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < kColumns; ++n) store_as(c[r] + n * kNative, v[r][n]);
    }
  }
};

template <int R>
void f32_rows(const uint8_t* a, ptrdiff_t stride, const uint8_t* panel, int begin, int end,
              float (*c)[kPanel], bool accumulate) {
  Sums<R, f32xn> sums(c, accumulate);
  const uint8_t* b = panel + size_t(begin) * kPanel * 4;
  for (int k = begin; k < end; ++k, b += kPanel * 4) {
    __builtin_prefetch(b + kAhead);
    __builtin_prefetch(b + kAhead + 64);
    f32xn w[kColumns];
    for (int n = 0; n < kColumns; ++n) w[n] = load_as<f32xn>(b + 4 * kNative * n);
    for (int r = 0; r < R; ++r) {
      const float x = load_as<float>(a + r * stride + 4 * k);
      for (int n = 0; n < kColumns; ++n) sums.v[r][n] += x * w[n];
    }
  }
  sums.write(c);
}

template <int R>
void bf16_rows(const uint8_t* a, ptrdiff_t stride, const uint8_t* panel, int begin, int end,
               float (*c)[kPanel], bool accumulate) {
  Sums<R, f32xn> sums(c, accumulate);
  const uint8_t* b = panel + size_t(begin) * kPanel * 2;
  for (int k = begin; k < end; k += 2, b += kPanel * 4) {
    __builtin_prefetch(b + kAhead);
    __builtin_prefetch(b + kAhead + 64);
    u32xn w[kColumns];
    for (int n = 0; n < kColumns; ++n) w[n] = load_as<u32xn>(b + 4 * kNative * n);
    for (int r = 0; r < R; ++r) {
      const uint32_t x = load_as<uint32_t>(a + r * stride + 2 * k);
      for (int n = 0; n < kColumns; ++n) sums.v[r][n] = dot_pairs(sums.v[r][n], x, w[n]);
    }
  }
  sums.write(c);
}

// acc + the products of quads of int8, exact in int32.
inline i32xn dot_quads(i32xn acc, const uint8_t* x, u32xn w) {
#if defined(__AVX512VNNI__)
  const __m512i quads = _mm512_set1_epi32(load_as<int32_t>(x));
  // As an intrinsic, GCC 12 keeps copies of the sums and spills them.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(quads), "v"(w));
  return acc;
#else
  const int8_t* q = reinterpret_cast<const int8_t*>(x);
#if defined(__SSE2__)
  // In 16 bits each; products of pairs of bytes in 16 bits could overflow.
  const auto pair = [](int8_t low, int8_t high) {
    return int32_t(uint32_t(uint16_t(low)) | uint32_t(uint16_t(high)) << 16);
  };
  const int32_t even = pair(q[0], q[2]), odd = pair(q[1], q[3]);
#if defined(__AVX2__)
  const __m256i words = (__m256i)w, low = _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8);
  acc += (i32xn)_mm256_madd_epi16(low, _mm256_set1_epi32(even));
  return acc + (i32xn)_mm256_madd_epi16(_mm256_srai_epi16(words, 8), _mm256_set1_epi32(odd));
#else
  const __m128i words = (__m128i)w, low = _mm_srai_epi16(_mm_slli_epi16(words, 8), 8);
  acc += (i32xn)_mm_madd_epi16(low, _mm_set1_epi32(even));
  return acc + (i32xn)_mm_madd_epi16(_mm_srai_epi16(words, 8), _mm_set1_epi32(odd));
#endif
#else
  const i32xn s = (i32xn)w;
  acc += ((s << 24) >> 24) * int32_t(q[0]) + ((s << 16) >> 24) * int32_t(q[1]);
  return acc + ((s << 8) >> 24) * int32_t(q[2]) + (s >> 24) * int32_t(q[3]);
#endif
#endif
}

template <int R>
void i8_rows(const uint8_t* a, ptrdiff_t stride, const uint8_t* panel, int begin, int end,
             int32_t (*c)[kPanel], bool accumulate) {
  Sums<R, i32xn> sums(c, accumulate);
  const uint8_t* b = panel + size_t(begin) * kPanel;
  for (int k = begin; k < end; k += 4, b += kPanel * 4) {
    __builtin_prefetch(b + kAhead);
    __builtin_prefetch(b + kAhead + 64);
    u32xn w[kColumns];
    for (int n = 0; n < kColumns; ++n) w[n] = load_as<u32xn>(b + 4 * kNative * n);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < kColumns; ++n) {
        sums.v[r][n] = dot_quads(sums.v[r][n], a + r * stride + k, w[n]);
      }
    }
  }
  sums.write(c);
}

// Calls the template instance for `rows` <= Most.
template <int Most, typename Call>
void with_rows(int rows, Call&& call) {
  if constexpr (Most > 1) {
    if (rows < Most) return with_rows<Most - 1>(rows, call);
  }
  call(std::integral_constant<int, Most>{});
}

#if defined(__AMX_TILE__)

// Tiles: 0 to 3 accumulate (2 x 2), 4 and 5 hold tokens, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

inline thread_local int configured_tiles = 0;

// Another library may have changed the tiles since this thread was here last.
inline void forget_tiles() { configured_tiles = 0; }

// Tiles of fewer rows take less time, so a decode step of few tokens configures just those.
inline void configure_tiles(int tokens) {
  const int first = tokens < 16 ? tokens : 16;
  if (configured_tiles == first) return;
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.bytes[t] = 64;
    config.rows[t] = 16;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = uint8_t(first);
  _tile_loadconfig(&config);
  configured_tiles = first;
}

template <bool kInt8, bool kTwo, bool kStreams>
void amx_tiles(const uint8_t* a, ptrdiff_t stride, const uint8_t* b, int steps, void* c,
               bool accumulate) {
  uint8_t* low = static_cast<uint8_t*>(c);
  uint8_t* high = low + 16 * kPanel * 4;
  constexpr int kStride = kPanel * 4;
  if (accumulate) {
    _tile_loadd(0, low, kStride);
    _tile_loadd(1, low + 64, kStride);
    if constexpr (kTwo) {
      _tile_loadd(2, high, kStride);
      _tile_loadd(3, high + 64, kStride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int s = 0; s < steps; ++s, a += 64, b += 2048) {
    if constexpr (kStreams) {
      for (int line = 0; line < 2048; line += 64) __builtin_prefetch(b + kAhead + line);
    }
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, stride);
    _tile_loadd(7, b + 1024, 64);
    if constexpr (kInt8) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwo) {
      _tile_loadd(5, a + 16 * stride, stride);
      if constexpr (kInt8) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, low, kStride);
  _tile_stored(1, low + 64, kStride);
  if constexpr (kTwo) {
    _tile_stored(2, high, kStride);
    _tile_stored(3, high + 64, kStride);
  }
}

template <bool kInt8>
void amx_product(const uint8_t* a, ptrdiff_t stride, const uint8_t* panel, int begin, int end,
                 int rows, bool streams, Tile& c, bool accumulate) {
  constexpr int kStep = kInt8 ? 64 : 32;
  const uint8_t* b = panel + size_t(begin / kStep) * 2048;
  const int steps = (end - begin) / kStep;
  a += begin * (kInt8 ? 1 : 2);
  configure_tiles(rows);
  if (rows <= 16) {
    amx_tiles<kInt8, false, true>(a, stride, b, steps, &c, accumulate);
  } else if (streams) {
    amx_tiles<kInt8, true, true>(a, stride, b, steps, &c, accumulate);
  } else {
    amx_tiles<kInt8, true, false>(a, stride, b, steps, &c, accumulate);
  }
}

#endif

// c = a [rows, begin..end) times the panel's transposed weights, or c += that.
//
// `a` must be readable for whole 16-row tiles; inputs are cut at multiples of 64. `streams` says
// that the weights come from memory, not from a product with other tokens just before.
inline void tile_product(const PackedWeight& w, int panel, const Operand& operand, int row0,
                         int rows, int begin, int end, [[maybe_unused]] bool streams, Tile& c,
                         bool accumulate) {
  const uint8_t* b = w.data + panel * w.panel_bytes();
  const uint8_t* a = operand.data + row0 * operand.stride;
  const ptrdiff_t stride = operand.stride;
#if defined(__AMX_TILE__)
  if (w.type == Type::kBF16) {
    return amx_product<false>(a, stride, b, begin, end, rows, streams, c, accumulate);
  }
  if (w.type == Type::kI8) {
    return amx_product<true>(a, stride, b, begin, end, rows, streams, c, accumulate);
  }
#endif
  for (int r = 0; r < rows; r += kRowsAtOnce, a += kRowsAtOnce * stride) {
    with_rows<kRowsAtOnce>(rows - r, [&](auto count) {
      constexpr int R = decltype(count)::value;
      if (w.type == Type::kF32) {
        f32_rows<R>(a, stride, b, begin, end, c.f32 + r, accumulate);
      } else if (w.type == Type::kBF16) {
        bf16_rows<R>(a, stride, b, begin, end, c.f32 + r, accumulate);
      } else {
        i8_rows<R>(a, stride, b, begin, end, c.i32 + r, accumulate);
      }
    });
  }
}

// Turns sums of int8 products into numbers, and adds the bias.
inline void finish_tile(const PackedWeight& w, int panel, const float* row_scales, int rows,
                        Tile& c) {
  const int first = panel * kPanel;
  for (int h = 0; h < 2; ++h) {
    const f32x16 bias = w.bias ? load(w.bias + first + 16 * h) : f32x16{};
    if (w.type == Type::kI8) {
      const f32x16 scales = load(w.scales + first + 16 * h);
      i32x16 sums = {};
      if constexpr (kI8Offset != 0) std::memcpy(&sums, w.sums + first + 16 * h, sizeof sums);
      for (int r = 0; r < rows; ++r) {
        i32x16 v;
        std::memcpy(&v, c.i32[r] + 16 * h, sizeof v);
        const f32x16 y = __builtin_convertvector(v - sums, f32x16) * (scales * row_scales[r]);
        store(c.f32[r] + 16 * h, y + bias);
      }
    } else if (w.bias) {
      for (int r = 0; r < rows; ++r) store(c.f32[r] + 16 * h, load(c.f32[r] + 16 * h) + bias);
    }
  }
}

}  // namespace PACELINE_ISA
}  // namespace paceline
