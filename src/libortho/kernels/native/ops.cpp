// Three operators of torch, in the signatures of kernels/reference.py. Only torch's stable ABI is
// used: these headers compile in seconds and a library built once serves later releases of torch.
//
// Python (kernels/native/__init__.py) checks what it passes; what is checked here protects memory.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "blocks.h"
#include "gram.h"
#include "operands.h"
#include "rows.h"
#include "tiles.h"

namespace libortho {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// function(T{}) with the type that stands for `dtype`.
template <class Function>
void with_type(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Float) {
    function(float{});
  } else if (dtype == ScalarType::Half) {
    function(Half{});
  } else if (dtype == ScalarType::BFloat16) {
    function(BFloat16{});
  } else {
    throw std::runtime_error("libortho: expected float32, float16 or bfloat16");
  }
}

Weight weight_of(const Tensor& qdata, const Maybe& scale, const Maybe& zero) {
  require(qdata.dim() == 2 && qdata.is_contiguous(), "libortho: qdata is not a contiguous matrix");
  Weight w{Storage::kFp16, qdata.size(0), qdata.size(1), 1, qdata.const_data_ptr(), nullptr,
           nullptr, nullptr};
  if (!scale) {
    require(qdata.scalar_type() == ScalarType::Half, "libortho: qdata without scale is not fp16");
    return w;
  }
  require(scale->dim() == 2 && scale->is_contiguous() && scale->size(0) == w.out,
          "libortho: scale is not (out_features, groups)");
  w.groups = scale->size(1);
  if (zero) {
    require(qdata.scalar_type() == ScalarType::Byte && zero->scalar_type() == ScalarType::Byte &&
                scale->scalar_type() == ScalarType::BFloat16,
            "libortho: int4 is uint8 qdata, bf16 scale and uint8 zero");
    require(zero->is_contiguous() && zero->numel() == scale->numel(),
            "libortho: zero is not shaped as scale");
    w.storage = Storage::kInt4;
    w.in *= 2;
    w.scale4 = data<BFloat16>(*scale);
    w.zero = data<uint8_t>(*zero);
  } else {
    require(qdata.scalar_type() == ScalarType::Char && scale->scalar_type() == ScalarType::Float,
            "libortho: int8 is int8 qdata and fp32 scale");
    w.storage = Storage::kInt8;
    w.scale8 = data<float>(*scale);
  }
  require(w.groups > 0 && w.in % w.groups == 0, "libortho: groups do not divide in_features");
  require(w.storage != Storage::kInt4 || w.group() % 32 == 0, "libortho: int4 group is not of 32s");
  return w;
}

ScalarType ortho_type(const std::vector<Tensor>& parts) {
  return parts.empty() ? ScalarType::Float : parts.back().scalar_type();
}

// [] for none, [left, right] for low-rank, [crow, col, values] for sparse.
template <class V>
Ortho<V> ortho_of(const std::vector<Tensor>& parts, int64_t out, int64_t in) {
  Ortho<V> ortho;
  for (const Tensor& part : parts) require(part.is_contiguous(), "libortho: ortho is strided");
  if (parts.size() == 2) {
    const Tensor &left = parts[0], &right = parts[1];
    require(left.dim() == 2 && right.dim() == 2 && left.size(0) == out && right.size(1) == in &&
                left.size(1) == right.size(0) && left.scalar_type() == right.scalar_type(),
            "libortho: factors are not (out, rank) and (rank, in) of one dtype");
    ortho.kind = OrthoKind::kLowRank;
    ortho.rank = left.size(1);
    ortho.left = data<V>(left);
    ortho.right = data<V>(right);
  } else if (parts.size() == 3) {
    require(parts[0].scalar_type() == ScalarType::Int && parts[1].scalar_type() == ScalarType::Int,
            "libortho: crow and col are not int32");
    require(parts[0].numel() == out + 1 && parts[1].numel() == parts[2].numel(),
            "libortho: CSR of another shape");
    ortho.kind = OrthoKind::kSparse;
    ortho.crow = data<int32_t>(parts[0]);
    ortho.col = data<int32_t>(parts[1]);
    ortho.values = data<V>(parts[2]);
  } else {
    require(parts.empty(), "libortho: ortho has 0, 2 or 3 tensors");
  }
  return ortho;
}

Alpha alpha_of(const Maybe& alpha, int64_t rows, bool needed) {
  if (!needed) return {};
  require(alpha && alpha->scalar_type() == ScalarType::Float && alpha->is_contiguous(),
          "libortho: alpha is not float32");
  const int64_t count = alpha->numel();
  require(count > 0 && rows % count == 0, "libortho: alpha does not divide the rows");
  return {data<float>(*alpha), rows / count};
}

// A parallel_for whose every task is worth waking a thread for.
template <class Function>
void parallel(int64_t count, int64_t work_each, const Function& function) {
  constexpr int64_t kWorth = 1 << 16;  // multiplications
  const int64_t grain = std::max<int64_t>(1, kWorth / std::max<int64_t>(1, work_each));
  torch::stable::parallel_for(0, count, grain, function);
}

template <class X, class V>
void run_few(const Weight& w, const Ortho<V>& ortho, Alpha alpha, const X* bias, const X* x,
             int64_t rows, X* y) {
  const FewRows wide(x, rows, w);
  const Buffer<float> inner = low_rank_inner(ortho, wide, alpha), sums(rows * w.out);
  parallel(w.out, w.in * rows, [&](int64_t begin, int64_t end) {
    few_rows(w, ortho, wide, inner.get(), alpha, begin, end, sums.get());
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t at = row * w.out + n;
        put(y + at, sums[at] + (bias == nullptr ? 0.0f : number(bias[n])));
      }
    }
  });
}

// alpha of every block of rows and, for low rank, alpha * right x^T.
struct Prepared {
  template <class V>
  Prepared(const Ortho<V>& ortho, int64_t blocks)
      : alpha(ortho.none() ? 0 : blocks), inner(ortho.rank * blocks * kLanes) {}

  Buffer<F> alpha;
  Buffer<float> inner;
};

#ifdef LIBORTHO_TILES
template <bool kInt8, class V>
void run_tiles(const Weight& w, const Ortho<V>& ortho, Alpha alpha, const BFloat16* bias,
               const BFloat16* x, int64_t rows, BFloat16* y) {
  const int64_t blocks = up(rows, kLanes) / kLanes;
  const int64_t plain = up(w.in * 2, kTileBytes), rounded = up(w.in, kTileBytes);
  const bool both = !kInt8 || !ortho.none();
  const Buffer<uint8_t> wide(both ? blocks * kLanes * plain : 0);
  const Buffer<uint8_t> narrow(kInt8 ? blocks * kLanes * rounded : 0);
  const Buffer<F> steps(kInt8 ? blocks : 0);
  const TileBlocks columns{wide.get(), plain}, codes{narrow.get(), rounded};
  const Prepared prepared(ortho, blocks);
  const RightTiles right(ortho, w.in, plain);
  parallel(blocks, w.in * kLanes, [&](int64_t begin, int64_t end) {
    std::optional<TileSession> session;
    if (ortho.rank > 0) session.emplace(right.height());
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kLanes, count = std::min(kLanes, rows - row);
      const BFloat16* from = x + row * w.in;
      if (both) pack_tiles(from, count, w.in * 2, wide.get() + row * plain);
      if constexpr (kInt8) {
        const Buffer<int8_t> some(count * w.in);
        F step = {};
        for (int64_t lane = 0; lane < count; ++lane) {
          step[lane] = round_row(from + lane * w.in, w.in, some.get() + lane * w.in);
        }
        steps[block] = step;
        pack_tiles(some.get(), count, w.in, narrow.get() + row * rounded);
      }
      if (!ortho.none()) prepared.alpha[block] = alpha_lanes(alpha, rows, block);
      if (ortho.rank > 0) {
        right.inner(wide.get() + row * plain, prepared.alpha[block],
                    prepared.inner.get() + row * ortho.rank);
      }
    }
  });
  parallel(up(w.out, kUnit) / kUnit, w.in * kUnit, [&](int64_t begin, int64_t end) {
    const TileSession session;
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      const int64_t block = row / kLanes;
      const TileBlocks ortho_x{columns.data + row * plain, plain};
      const TileBlocks base_x{codes.data + row * rounded, rounded};
      const Panel panel{kInt8 ? base_x : ortho_x, ortho_x, steps.get() + block,
                        std::min(kPanelRows, rows - row)};
      tile_units<kInt8>(w, ortho, panel, prepared.inner.get() + block * ortho.rank * kLanes,
                        prepared.alpha.get() + block, bias, begin, end, y + row * w.out);
    }
  });
}
#endif

// How split_linear goes about it: row by row of x, by tiles of bf16, or by tiles of INT8 with x
// rounded row by row.
constexpr int64_t kRows = 0, kTiles = 1, kInt8Tiles = 2;

bool has_tiles() {
#ifdef LIBORTHO_TILES
  return tiles_permitted();
#else
  return false;
#endif
}

bool has_matrix_tiles() {
#ifdef LIBORTHO_AMX
  return has_tiles();
#else
  return false;
#endif
}

Tensor split_linear(Tensor x, Tensor qdata, Maybe scale, Maybe zero, Maybe bias,
                    std::vector<Tensor> ortho, Maybe alpha, int64_t way) {
  const Weight w = weight_of(qdata, scale, zero);
  require(x.is_contiguous() && x.dim() > 0 && x.size(x.dim() - 1) == w.in,
          "libortho: x is not (..., in_features) and contiguous");
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim < x.dim(); ++dim) shape.push_back(x.size(dim));
  shape.back() = w.out;
  Tensor y = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape));
  const int64_t rows = x.numel() / w.in;
  const Alpha shared = alpha_of(alpha, rows, !ortho.empty());
  require(!bias || (bias->is_contiguous() && bias->numel() == w.out &&
                    bias->scalar_type() == x.scalar_type()),
          "libortho: bias is not (out_features,) in the dtype of x");
  with_type(ortho_type(ortho), [&](auto value) {
    using V = decltype(value);
    const Ortho<V> parts = ortho_of<V>(ortho, w.out, w.in);
    with_type(x.scalar_type(), [&](auto number) {
      using X = decltype(number);
      const X* added = bias ? data<X>(*bias) : nullptr;
      X* to = static_cast<X*>(y.mutable_data_ptr());
#ifdef LIBORTHO_TILES
      if constexpr (std::is_same_v<X, BFloat16>) {
        if (way == kTiles && has_tiles() && (w.groups == 1 || w.group() % kTileColumns == 0)) {
          run_tiles<false>(w, parts, shared, added, data<X>(x), rows, to);
          return;
        }
        if (way == kInt8Tiles && has_tiles() && w.storage == Storage::kInt8 && w.groups == 1) {
          run_tiles<true>(w, parts, shared, added, data<X>(x), rows, to);
          return;
        }
      }
#endif
      require(way == kRows, "libortho: no tiles for this");
      run_few(w, parts, shared, added, data<X>(x), rows, to);
    });
  });
  return y;
}

void add_ortho_(Tensor y, Tensor x, std::vector<Tensor> ortho, Maybe alpha) {
  const int64_t in = x.size(x.dim() - 1), out = y.size(y.dim() - 1);
  require(x.is_contiguous() && y.is_contiguous() && x.scalar_type() == y.scalar_type() &&
              x.numel() / in == y.numel() / out,
          "libortho: x and y are not contiguous rows of one dtype");
  const int64_t rows = x.numel() / in, blocks = up(rows, kLanes) / kLanes;
  const Alpha shared = alpha_of(alpha, rows, !ortho.empty());
  with_type(ortho_type(ortho), [&](auto value) {
    using V = decltype(value);
    const Ortho<V> parts = ortho_of<V>(ortho, out, in);
    with_type(x.scalar_type(), [&](auto number) {
      using X = decltype(number);
      const Buffer<float> packed(blocks * kLanes * in);
      const FloatBlocks columns{packed.get(), in};
      const Prepared prepared(parts, blocks);
      const Buffer<float> right = widened(parts.right, parts.rank * in);
      parallel(blocks, in * kLanes, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          pack_floats(data<X>(x), rows, in, block, packed.get());
          if (parts.none()) continue;
          prepared.alpha[block] = alpha_lanes(shared, rows, block);
          low_rank_block(right.get(), parts.rank, columns, in, block, prepared.alpha[block],
                         prepared.inner.get() + block * parts.rank * kLanes);
        }
      });
      X* to = static_cast<X*>(y.mutable_data_ptr());
      parallel(up(out, kLanes) / kLanes, rows * kLanes * 16, [&](int64_t begin, int64_t end) {
        add_ortho(parts, columns, prepared.inner.get(), prepared.alpha.get(), rows, out,
                  begin * kLanes, std::min(out, end * kLanes), to);
      });
    });
  });
}

// Lower triangle only; what lies above the diagonal is left as it is, or is not, by squares.
void add_gram_(Tensor matrix, Tensor rows) {
  require(rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == ScalarType::BFloat16,
          "libortho: rows are not a contiguous matrix of bf16");
  const int64_t count = rows.size(0), width = rows.size(1);
  require(matrix.dim() == 2 && matrix.is_contiguous() && matrix.size(0) == width &&
              matrix.size(1) == width && matrix.scalar_type() == ScalarType::Float,
          "libortho: matrix is not (columns, columns), contiguous and fp32");
  require(has_tiles(), "libortho: no tiles");
#ifdef LIBORTHO_TILES
  const GramStrips strips(count, width);
  parallel(strips.strips(), count * kUnit, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) strips.pack(data<BFloat16>(rows), strip);
  });
  float* to = static_cast<float*>(matrix.mutable_data_ptr());
  parallel(up(strips.strips(), 2) / 2, count * kUnit * width, [&](int64_t begin, int64_t end) {
    const TileSession session;
    add_gram_rows(strips, begin, end, width, to);
  });
#endif
}

}  // namespace
}  // namespace libortho

STABLE_TORCH_LIBRARY(libortho_native, library) {
  library.def(
      "split_linear(Tensor x, Tensor qdata, Tensor? scale, Tensor? zero, Tensor? bias, "
      "Tensor[] ortho, Tensor? alpha, int way) -> Tensor");
  library.def("add_ortho_(Tensor(a!) y, Tensor x, Tensor[] ortho, Tensor? alpha) -> ()");
  library.def("add_gram_(Tensor(a!) matrix, Tensor rows) -> ()");
  library.def("has_tiles() -> bool");
  library.def("has_matrix_tiles() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(libortho_native, CPU, library) {
  library.impl("split_linear", TORCH_BOX(&libortho::split_linear));
  library.impl("add_ortho_", TORCH_BOX(&libortho::add_ortho_));
  library.impl("add_gram_", TORCH_BOX(&libortho::add_gram_));
}

STABLE_TORCH_LIBRARY_IMPL(libortho_native, CompositeExplicitAutograd, library) {
  library.impl("has_tiles", TORCH_BOX(&libortho::has_tiles));
  library.impl("has_matrix_tiles", TORCH_BOX(&libortho::has_matrix_tiles));
}
