// y[T, F] = x[T, D] . w[F, D]^T on int8 codes, exact in int32, for XLA's CPU backend;
// or that as floats, multiplied by scales of the rows of x and w.
//
// Every value of int8 is allowed, -128 too. D may be anything up to where int32 itself
// overflows (the caller checks). With few rows of x the weight is read as it lies; with
// more, panels of it are rearranged in the first level cache, so that sums of several
// outputs share a vector. No copy of the whole is ever made. Work is split over F, on
// the threads XLA already runs.
//
// Letters: T rows of x, F rows of w, D codes in a row; R x C the tile of outputs whose
// sums stay in registers.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <type_traits>
#include <vector>

#include "int8_isa.h"
#include "xla/ffi/api/ffi.h"

namespace {

constexpr int64_t kStep = Isa::kStep;
// Rows of x multiplied before the next rows of w are read: as many as half of a first
// level cache of 32 KiB holds.
constexpr int64_t kBlockBytes = 16 * 1024;
// How many tiles ahead the weight is fetched.
constexpr int64_t kTilesAhead = 2;
// A panel of w, as long as half of a first level cache holds.
constexpr int64_t kPanelBytes = 16 * 1024;
// Products below this many multiplications are not worth waking another thread.
constexpr int64_t kMultiplicationsPerTask = int64_t{1} << 18;
// Tasks for each thread, so that one that is interrupted does not hold up the rest.
constexpr int64_t kTasksPerThread = 8;

constexpr int64_t kLineCodes = 64 / sizeof(Isa::Held);
// Starts where a line of the cache does: a vector read across two lines is read twice.
struct alignas(64) Line {
  Isa::Held codes[kLineCodes];
};

struct Product {
  std::vector<Line> copy;
  const Isa::Held* x;  // [T, stride], rows filled up with zeros
  std::vector<int32_t> start;  // [T], what w + kOffset in place of w adds, negated
  int64_t stride;
  const int8_t* w;
  int32_t* y;
  int64_t num_t, num_f, num_d;

  Product(const int8_t* x_codes, const int8_t* w, int32_t* y, int64_t num_t,
          int64_t num_f, int64_t num_d)
      : start(num_t),
        stride((num_d + kStep - 1) / kStep * kStep),
        w(w), y(y), num_t(num_t), num_f(num_f), num_d(num_d) {
    bool as_it_lies = false;
    if constexpr (std::is_same_v<Isa::Held, int8_t>) {
      x = x_codes;
      as_it_lies = stride == num_d && reinterpret_cast<uintptr_t>(x_codes) % 64 == 0;
    }
    if (!as_it_lies) {
      copy.resize((num_t * stride + kLineCodes - 1) / kLineCodes);
      for (int64_t t = 0; t < num_t; ++t) {
        const int8_t* row = x_codes + t * num_d;
        std::copy(row, row + num_d, copy.data()->codes + t * stride);
      }
      x = copy.data()->codes;
    }
    for (int64_t t = 0; t < num_t; ++t) {
      const int8_t* row = x_codes + t * num_d;
      if constexpr (Isa::kOffset != 0) {
        // Unsigned, because wrapping around is meant.
        const auto sum = std::accumulate(row, row + num_d, uint32_t{0});
        start[t] = static_cast<int32_t>(-sum * Isa::kOffset);
      }
    }
  }

  // Outputs [t, t + R) x [f, f + C). Meanwhile every `every`-th step asks for the next
  // part of `later`, weights of a tile to come: rows are too short for the hardware to
  // see a pattern in.
  template <int R, int C>
  void Tile(int64_t t, int64_t f, const int8_t* later, int64_t every) const {
    const Isa::Held* x_row = x + t * stride;
    const int8_t* w_row = w + f * num_d;
    Isa::Sum sums[R * C];
    EFFJAX_UNROLL for (int i = 0; i < R * C; ++i) sums[i] = Isa::Zero();
    // `load` gives the codes of w from an address.
    auto step = [&](int64_t d, auto load) EFFJAX_INLINE {
      Isa::Codes w_codes[C];
      EFFJAX_UNROLL for (int c = 0; c < C; ++c) w_codes[c] = load(w_row + c * num_d + d);
      EFFJAX_UNROLL for (int r = 0; r < R; ++r) {
        auto x_codes = Isa::LoadX(x_row + r * stride + d);
        EFFJAX_UNROLL for (int c = 0; c < C; ++c) {
          sums[r * C + c] = Isa::Step(sums[r * C + c], x_codes, w_codes[c]);
        }
      }
    };
    int64_t d = 0;
    int64_t wait = every;
    for (; d + kStep <= num_d; d += kStep) {
      if (--wait == 0) {
        for (int b = 0; b < C * kStep; b += 64) __builtin_prefetch(later + b);
        later += C * kStep;
        wait = every;
      }
      step(d, Isa::LoadW);
    }
    if (d < num_d) {
      step(d, [&](const int8_t* from) { return Isa::LoadRest(from, num_d - d); });
    }
    int32_t totals[Isa::Padded(R * C)];
    Isa::Totals(sums, totals);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        y[(t + r) * num_f + f + c] = static_cast<int32_t>(
            static_cast<uint32_t>(totals[r * C + c]) +
            static_cast<uint32_t>(start[t + r]));
      }
    }
  }

  // Outputs [t, t_end) x [f, f + C). The tiles share the fetching of later weights.
  template <int R, int C>
  void Rows(int64_t t, int64_t t_end, int64_t f, const int8_t* later,
            int64_t every) const {
    for (; t + R <= t_end; t += R) {
      Tile<R, C>(t, f, later, every);
      later += C * num_d / every;
    }
    if constexpr (R > 1) Rows<R - 1, C>(t, t_end, f, later, every);
  }

  // Outputs of columns [f, f_end), weights read as they lie.
  void Whole(int64_t f, int64_t f_end) const {
    const int64_t row_bytes = stride * sizeof(Isa::Held);
    const int64_t rows = std::max<int64_t>(
        kBlockBytes / std::max<int64_t>(row_bytes, 1) / Isa::kRows, 1) * Isa::kRows;
    for (int64_t t = 0; t < num_t; t += rows) {
      const int64_t t_end = std::min(t + rows, num_t);
      const int64_t every = (t_end - t + Isa::kRows - 1) / Isa::kRows;
      int64_t c = f;
      for (; c + Isa::kCols <= f_end; c += Isa::kCols) {
        const int64_t ahead =
            std::min<int64_t>(c + kTilesAhead * Isa::kCols, num_f - Isa::kCols);
        const int8_t* later = w + ahead * num_d;
        Rows<Isa::kRows, Isa::kCols>(t, t_end, c, later, every);
      }
      for (; c < f_end; ++c) Rows<Isa::kRows, 1>(t, t_end, c, w, every);
    }
  }

#if defined(__AVX2__)
  // Codes [f, f + kPanel) x [d, d_end) of w as [codes / 4, kPanel, 4]: then a vector
  // holds outputs side by side, and sums need no adding up across it.
  void Pack(int64_t f, int64_t d, int64_t d_end, int8_t* panel) const {
    for (; d < d_end; d += 32, panel += 8 * 4 * Isa::kPanel) {
      for (int64_t part = 0; part < Isa::kPanel; part += 8) {
        __m256i rows[8], pairs[8], fours[8];
        for (int i = 0; i < 8; ++i) {
          const int8_t* row = w + (f + part + i) * num_d + d;
          alignas(32) int8_t rest[32] = {};
          if (d + 32 > num_d) {
            std::memcpy(rest, row, num_d - d);
            row = rest;
          }
          rows[i] = Isa::Packed(_mm256_loadu_si256(
              reinterpret_cast<const __m256i*>(row)));
        }
        for (int i = 0; i < 8; i += 2) {
          pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
          pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
          for (int k = 0; k < 2; ++k) {
            fours[i + 2 * k] = _mm256_unpacklo_epi64(pairs[i + k], pairs[i + k + 2]);
            fours[i + 2 * k + 1] =
                _mm256_unpackhi_epi64(pairs[i + k], pairs[i + k + 2]);
          }
        }
        for (int i = 0; i < 4; ++i) {
          auto at = [&](int group) {
            return reinterpret_cast<__m256i*>(panel +
                                              (group * Isa::kPanel + part) * 4);
          };
          _mm256_store_si256(
              at(i), _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20));
          _mm256_store_si256(
              at(i + 4), _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31));
        }
      }
    }
  }

  // Adds to outputs [t, t + R) x [f, f + kPanel) what `fours` groups of codes from d on
  // contribute; those from 0 on are the first.
  template <int R>
  void PanelTile(int64_t t, int64_t f, int64_t d, int64_t fours,
                 const int8_t* panel) const {
    constexpr int C = Isa::kSums;
    const Isa::Held* x_row = x + t * stride + d;
    Isa::Sum sums[R][C];
    for (auto& row : sums) std::fill_n(row, C, Isa::Zero());
    for (int64_t g = 0; g < fours; ++g) {
      Isa::Codes w_codes[C];
      for (int c = 0; c < C; ++c) {
        w_codes[c] = Isa::FromPanel(panel + (g * C + c) * (Isa::kPanel * 4 / C));
      }
      for (int r = 0; r < R; ++r) {
        auto x_codes = Isa::FourOfX(x_row + r * stride + 4 * g);
        // In this order: compilers would load the codes of all rows first, and have no
        // registers left for the sums.
        EFFJAX_KEEP_ORDER(x_codes);
        for (int c = 0; c < C; ++c) {
          sums[r][c] = Isa::Step(sums[r][c], x_codes, w_codes[c]);
          EFFJAX_KEEP_ORDER(sums[r][c]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      int32_t* at = y + (t + r) * num_f + f;
      if (d == 0) {
        Isa::Begin(sums[r], start[t + r], at);
      } else {
        Isa::Add(sums[r], at);
      }
    }
  }

  // The same for rows [t, t_end).
  template <int R>
  void PanelRows(int64_t t, int64_t t_end, int64_t f, int64_t d, int64_t fours,
                 const int8_t* panel) const {
    for (; t + R <= t_end; t += R) PanelTile<R>(t, f, d, fours, panel);
    if constexpr (R > 1) PanelRows<R - 1>(t, t_end, f, d, fours, panel);
  }

  // Outputs of columns [f, f_end), a whole number of panels.
  void Panels(int64_t f, int64_t f_end) const {
    constexpr int64_t kDepth = kPanelBytes / Isa::kPanel;
    alignas(64) int8_t panel[kPanelBytes];
    for (; f < f_end; f += Isa::kPanel) {
      for (int64_t d = 0; d < num_d; d += kDepth) {
        const int64_t d_end = std::min(d + kDepth, num_d);
        Pack(f, d, d_end, panel);
        PanelRows<Isa::kTall>(0, num_t, f, d, (d_end - d + 3) / 4, panel);
      }
    }
  }
#endif

  void Columns(int64_t f, int64_t f_end) const {
#if defined(__AVX2__)
    if (num_t >= Isa::kPanelRows) {
      const int64_t panels = (f_end - f) / Isa::kPanel * Isa::kPanel;
      Panels(f, f + panels);
      f += panels;
    }
#endif
    if (f < f_end) Whole(f, f_end);
  }

  // Sums of columns [f, f_end) into floats, where they lie and while they are in the
  // cache: sum * of_x[row] * of_w[column].
  void Scale(int64_t f, int64_t f_end, const float* of_x, const float* of_w) const {
    for (int64_t t = 0; t < num_t; ++t) {
      int32_t* row = y + t * num_f;
      for (int64_t c = f; c < f_end; ++c) {
        const float scaled = static_cast<float>(row[c]) * of_x[t] * of_w[c];
        std::memcpy(row + c, &scaled, sizeof scaled);
      }
    }
  }
};

// A product and how much of it is taken and done. It outlives the call: a task that
// gets a thread only after the end finds nothing left and touches no array.
struct Shared {
  Product product;
  const float *of_x, *of_w;  // scales, or null
  int64_t columns, num_tasks;
  std::atomic<int64_t> taken{0}, done{0};

  void Work() {
    for (;;) {
      const int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      const int64_t f = task * columns;
      const int64_t f_end = std::min(f + columns, product.num_f);
      product.Columns(f, f_end);
      if (of_x != nullptr) product.Scale(f, f_end, of_x, of_w);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  // Waits only for tasks another thread is executing right now, so it cannot deadlock
  // with a pool whose threads all wait.
  void Wait() const {
    for (int spins = 0; done.load(std::memory_order_acquire) < num_tasks; ++spins) {
#if defined(__AVX2__)
      if (spins < 4096) {
        _mm_pause();
        continue;
      }
#endif
      std::this_thread::yield();
    }
  }
};

using Codes = xla::ffi::Buffer<xla::ffi::S8>;
using Scales = xla::ffi::Buffer<xla::ffi::F32>;

// y holds num_t * num_f numbers, floats if there are scales and int32 if there are not.
xla::ffi::Error Run(xla::ffi::ThreadPool& pool, const Codes& x, const Codes& w,
                    void* y, int64_t size, const float* of_x, const float* of_w) {
  const auto dims = w.dimensions();
  if (dims.size() != 2 || x.dimensions().size() == 0 ||
      x.dimensions().back() != dims[1]) {
    return xla::ffi::Error::InvalidArgument("x must be [..., D] and w [F, D]");
  }
  const int64_t num_f = dims[0], num_d = dims[1];
  const int64_t num_t = num_f ? size / num_f : 0;
  if (num_t == 0 || num_d == 0) {  // an empty sum is zero
    std::memset(y, 0, size * sizeof(int32_t));
    return xla::ffi::Error::Success();
  }
  const int64_t worth =
      std::max<int64_t>(num_t * num_f * num_d / kMultiplicationsPerTask, 1);
  const int64_t threads = std::min(pool.num_threads(), worth);
  const int64_t wanted = threads > 1 ? std::min(kTasksPerThread * threads, worth) : 1;
  const bool panels = Isa::kPanel != 0 && num_t >= Isa::kPanelRows;
  const int64_t unit = panels ? Isa::kPanel : Isa::kCols;
  const int64_t units = (num_f + unit - 1) / unit;
  const int64_t columns = (units + wanted - 1) / wanted * unit;
  const int64_t num_tasks = (num_f + columns - 1) / columns;
  std::shared_ptr<Shared> shared(
      new Shared{Product(x.typed_data(), w.typed_data(), static_cast<int32_t*>(y),
                         num_t, num_f, num_d),
                 of_x, of_w, columns, num_tasks});
  for (int64_t i = 1; i < std::min(threads, num_tasks); ++i) {
    pool.Schedule([shared] { shared->Work(); });
  }
  shared->Work();
  shared->Wait();
  return xla::ffi::Error::Success();
}

xla::ffi::Error Dot(xla::ffi::ThreadPool pool, Codes x, Codes w,
                    xla::ffi::ResultBuffer<xla::ffi::S32> y) {
  return Run(pool, x, w, y->typed_data(), y->element_count(), nullptr, nullptr);
}

xla::ffi::Error ScaledDot(xla::ffi::ThreadPool pool, Codes x, Codes w, Scales of_x,
                          Scales of_w, xla::ffi::ResultBuffer<xla::ffi::F32> y) {
  return Run(pool, x, w, y->typed_data(), y->element_count(), of_x.typed_data(),
             of_w.typed_data());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(effjax_int8_dot, Dot,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Codes>()
                                  .Arg<Codes>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(effjax_int8_dot_scaled, ScaledDot,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Codes>()
                                  .Arg<Codes>()
                                  .Arg<Scales>()
                                  .Arg<Scales>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

// The same product on one thread, without XLA: for checking what was built.
extern "C" void effjax_int8_dot_plain(const int8_t* x, const int8_t* w, int32_t* y,
                                      int64_t num_t, int64_t num_f, int64_t num_d) {
  Product(x, w, y, num_t, num_f, num_d).Columns(0, num_f);
}
