// The stored weight, the ortho stream and alpha, as the kernels see them.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "vector.h"

namespace libortho {

// Memory that a thread has used and will use again. Given back to the system after each call, and
// cleared by it for the next, it costs more than a small product.
class Scratch {
 public:
  static Scratch& mine() {
    thread_local Scratch scratch;
    return scratch;
  }

  // At least `bytes` from the start of a cache line on, as loads of whole tiles and vectors want it;
  // `bytes` becomes how many.
  void* take(size_t& bytes) {
    bytes = std::bit_ceil(std::max<size_t>(bytes, 64));
    std::vector<void*>& kept = kept_[std::countr_zero(bytes)];
    if (!kept.empty()) {
      void* memory = kept.back();
      kept.pop_back();
      held_ -= bytes;
      return memory;
    }
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    return memory;
  }

  void give(void* memory, size_t bytes) {
    if (held_ + bytes > kMost) {
      std::free(memory);
      return;
    }
    kept_[std::countr_zero(bytes)].push_back(memory);
    held_ += bytes;
  }

  ~Scratch() {
    for (const std::vector<void*>& kept : kept_) {
      for (void* memory : kept) std::free(memory);
    }
  }

 private:
  static constexpr size_t kMost = 16 << 20;  // bytes that wait for the next call
  std::array<std::vector<void*>, 64> kept_;  // by the logarithm of their size
  size_t held_ = 0;
};

// An array in scratch memory; it must end in the thread in which it began.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    size_t bytes = static_cast<size_t>(count) * sizeof(T);
    T* memory = static_cast<T*>(Scratch::mine().take(bytes));
    memory_ = std::unique_ptr<T, Give>(memory, Give{bytes});
  }
  T* get() const { return memory_.get(); }
  T& operator[](int64_t index) const { return memory_.get()[index]; }

 private:
  struct Give {
    size_t bytes = 0;
    void operator()(T* memory) const { Scratch::mine().give(memory, bytes); }
  };
  std::unique_ptr<T, Give> memory_;
};

// `count` numbers as fp32.
template <class X>
void widen_all(const X* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F lanes = widen(from + i);
    std::memcpy(to + i, &lanes, sizeof lanes);
  }
  for (; i < count; ++i) to[i] = number(from[i]);
}
template <class X>
Buffer<float> widened(const X* from, int64_t count) {
  Buffer<float> wide(count);
  widen_all(from, count, wide.get());
  return wide;
}

enum class Storage { kFp16, kInt8, kInt4 };

// W (out, in), as kernels/reference.py defines its three forms.
struct Weight {
  Storage storage;
  int64_t out, in, groups;
  const void* qdata;
  const float* scale8;      // int8: (out, groups)
  const BFloat16* scale4;   // int4: (out, groups)
  const uint8_t* zero;      // int4: (out, groups), in 16ths of a code

  int64_t group() const { return in / groups; }
};

enum class OrthoKind { kNone, kLowRank, kSparse };

// V is the type of the stored numbers: float, Half or BFloat16.
template <class V>
struct Ortho {
  OrthoKind kind = OrthoKind::kNone;
  int64_t rank = 0;
  const V* left = nullptr;   // (out, rank)
  const V* right = nullptr;  // (rank, in)
  const int32_t* crow = nullptr;
  const int32_t* col = nullptr;
  const V* values = nullptr;

  bool none() const { return kind == OrthoKind::kNone; }
};

// alpha of each flat row of x: its values are shared by equally many consecutive rows.
struct Alpha {
  const float* values = nullptr;
  int64_t share = 1;

  float at(int64_t row) const { return values[row / share]; }
};

// Asks memory for what a reader will want: hardware's own reading ahead stops at each page's end.
template <int64_t Ahead>
inline void ask_for(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + Ahead);
}

// What the zero points of one output take away: sum over groups of scale * zero * sums.
inline float zero_part(const BFloat16* scale, const uint8_t* zero, const float* sums,
                       int64_t groups) {
  F acc = {};
  float rest = 0;
  int64_t g = 0;
  for (; g + kLanes <= groups; g += kLanes) {
    acc += __builtin_convertvector(std::bit_cast<I>(integers(zero + g)), F) * widen(scale + g) *
           load<F>(sums + g);
  }
  for (; g < groups; ++g) rest += number(scale[g]) * zero[g] * sums[g];
  return sum(acc) + rest;
}

inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace libortho
