// y[T, F] = x[T, D] . w[F, D]^T on int8 codes, exact in int32, for XLA's CPU backend.
//
// Every value of int8 is allowed, -128 too. D may be anything up to where int32 itself
// overflows (the caller checks). The weight is read as it lies: once from memory for
// each block of rows of x, never packed into a copy. Work is split over F, on the
// threads XLA already runs.
//
// Letters: T rows of x, F rows of w, D codes in a row; R x C the tile of outputs whose
// sums stay in registers.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

// An instruction set: `Held` is how a code of x is kept while it is reused, kStep how
// many codes of a row one step multiplies, kRows x kCols the largest tile. A sum taken
// with x + kOffset in place of x is corrected by kOffset times the sum of w.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

// vpdpbusd multiplies unsigned by signed codes: x is held as x + 128. Its sums wrap
// around like int32, so the correction is exact even if one of them passes 2^31.
struct Isa {
  using Held = uint8_t;
  using Codes = __m512i;
  using Sum = __m512i;
  static constexpr int kStep = 64, kRows = 4, kCols = 4, kOffset = 128;
  static Held Hold(int8_t x) { return static_cast<Held>(x + kOffset); }
  static Sum Zero() { return _mm512_setzero_si512(); }
  static Codes Load(const Held* x) { return _mm512_loadu_si512(x); }
  static Codes Load(const int8_t* w) { return _mm512_loadu_si512(w); }
  static Sum Step(Sum sum, Codes x, Codes w) { return _mm512_dpbusd_epi32(sum, x, w); }
  static Codes Offset() { return _mm512_set1_epi8(static_cast<char>(kOffset)); }
  static int32_t Total(Sum sum) { return _mm512_reduce_add_epi32(sum); }
};

#elif defined(__AVX2__)

// vpmaddwd on codes widened to int16: the widening of w is shared by the rows of a
// tile. vpmaddubsw takes twice the codes an instruction but needs as many in all (signs
// moved to w, pairs widened) and cannot hold -128 * -128 * 2.
struct Isa {
  using Held = int16_t;
  using Codes = __m256i;
  using Sum = __m256i;
  static constexpr int kStep = 16, kRows = 3, kCols = 3, kOffset = 0;
  static Held Hold(int8_t x) { return x; }
  static Sum Zero() { return _mm256_setzero_si256(); }
  static Codes Load(const Held* x) {
    Codes codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    // Stays in a register: compilers would load it again for each product of a tile.
    asm("" : "+x"(codes));
    return codes;
  }
  static Codes Load(const int8_t* w) {
    return _mm256_cvtepi8_epi16(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  static Sum Step(Sum sum, Codes x, Codes w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w));
  }
  static Codes Offset() { return Zero(); }
  static int32_t Total(Sum sum) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum),
                                 _mm256_extracti128_si256(sum, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    return _mm_cvtsi128_si32(half);
  }
};

#else

// Plain loops over short arrays, which compilers turn into what the machine has.
struct Isa {
  using Held = int8_t;
  static constexpr int kStep = 16, kRows = 2, kCols = 2, kOffset = 0;
  struct Codes {
    int8_t at[kStep];
  };
  struct Sum {
    int32_t at[kStep / 4];
  };
  static Held Hold(int8_t x) { return x; }
  static Sum Zero() { return {}; }
  static Codes Load(const int8_t* x) {
    Codes codes;
    std::memcpy(codes.at, x, kStep);
    return codes;
  }
  static Sum Step(Sum sum, Codes x, Codes w) {
    for (int i = 0; i < kStep; ++i) sum.at[i / 4] += int32_t{x.at[i]} * w.at[i];
    return sum;
  }
  static Codes Offset() { return {}; }
  static int32_t Total(Sum sum) {
    int32_t total = 0;
    for (int32_t part : sum.at) total += part;
    return total;
  }
};

#endif

constexpr int64_t kStep = Isa::kStep;
// Rows of x multiplied before the next rows of w are read: as many as half of a first
// level cache of 32 KiB holds.
constexpr int64_t kBlockBytes = 16 * 1024;
// How many tiles ahead the weight is fetched.
constexpr int64_t kTilesAhead = 2;
// Products below this many multiplications are not worth waking another thread.
constexpr int64_t kMultiplicationsPerTask = int64_t{1} << 18;
// Tasks for each thread, so that one that is interrupted does not hold up the rest.
constexpr int64_t kTasksPerThread = 4;

struct Product {
  std::vector<Isa::Held> x;  // [T, stride], rows filled up with what multiplies to 0
  int64_t stride;
  const int8_t* w;
  int32_t* y;
  int64_t num_t, num_f, num_d;

  Product(const int8_t* x_codes, const int8_t* w, int32_t* y, int64_t num_t,
          int64_t num_f, int64_t num_d)
      : x(num_t * ((num_d + kStep - 1) / kStep * kStep)),
        stride((num_d + kStep - 1) / kStep * kStep),
        w(w), y(y), num_t(num_t), num_f(num_f), num_d(num_d) {
    for (int64_t t = 0; t < num_t; ++t) {
      std::transform(x_codes + t * num_d, x_codes + (t + 1) * num_d,
                     x.begin() + t * stride, Isa::Hold);
    }
  }

  // Outputs [t, t + R) x [f, f + C). Meanwhile every `every`-th step asks for the next
  // part of `later`, weights of a tile to come: rows are too short for the hardware to
  // see a pattern in.
  template <int R, int C>
  void Tile(int64_t t, int64_t f, const int8_t* later, int64_t every) const {
    const Isa::Held* x_row = x.data() + t * stride;
    const int8_t* w_row = w + f * num_d;
    Isa::Sum sums[R][C], w_sums[C];
    for (int c = 0; c < C; ++c) {
      w_sums[c] = Isa::Zero();
      for (int r = 0; r < R; ++r) sums[r][c] = Isa::Zero();
    }
    auto step = [&](int64_t d, const int8_t* w_step, int64_t w_stride) {
      decltype(Isa::Load(w_row)) w_codes[C];
      for (int c = 0; c < C; ++c) {
        w_codes[c] = Isa::Load(w_step + c * w_stride);
        if constexpr (Isa::kOffset != 0) {
          w_sums[c] = Isa::Step(w_sums[c], Isa::Offset(), w_codes[c]);
        }
      }
      for (int r = 0; r < R; ++r) {
        auto x_codes = Isa::Load(x_row + r * stride + d);
        for (int c = 0; c < C; ++c) {
          sums[r][c] = Isa::Step(sums[r][c], x_codes, w_codes[c]);
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
      step(d, w_row + d, num_d);
    }
    if (d < num_d) {
      int8_t rest[C * kStep] = {};
      for (int c = 0; c < C; ++c) {
        std::memcpy(rest + c * kStep, w_row + c * num_d + d, num_d - d);
      }
      step(d, rest, kStep);
    }
    for (int c = 0; c < C; ++c) {
      const int32_t correction = Isa::kOffset != 0 ? Isa::Total(w_sums[c]) : 0;
      for (int r = 0; r < R; ++r) {
        // Unsigned, because wrapping around is meant.
        y[(t + r) * num_f + f + c] = static_cast<int32_t>(
            static_cast<uint32_t>(Isa::Total(sums[r][c])) -
            static_cast<uint32_t>(correction));
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

  void Columns(int64_t f, int64_t f_end) const {
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
};

// A product and how much of it is taken and done. It outlives the call: a task that
// gets a thread only after the end finds nothing left and touches no array.
struct Shared {
  Product product;
  int64_t columns, num_tasks;
  std::atomic<int64_t> taken{0}, done{0};

  void Work() {
    for (;;) {
      const int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      const int64_t f = task * columns;
      product.Columns(f, std::min(f + columns, product.num_f));
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

xla::ffi::Error Dot(xla::ffi::ThreadPool pool, xla::ffi::Buffer<xla::ffi::S8> x,
                    xla::ffi::Buffer<xla::ffi::S8> w,
                    xla::ffi::ResultBuffer<xla::ffi::S32> y) {
  const auto dims = w.dimensions();
  if (dims.size() != 2 || x.dimensions().size() == 0 ||
      x.dimensions().back() != dims[1]) {
    return xla::ffi::Error::InvalidArgument("x must be [..., D] and w [F, D]");
  }
  const int64_t num_f = dims[0], num_d = dims[1];
  const int64_t num_t = num_d ? x.element_count() / num_d : 0;
  if (num_t == 0 || num_f == 0) {  // an empty sum is zero
    std::fill_n(y->typed_data(), y->element_count(), 0);
    return xla::ffi::Error::Success();
  }
  Product product(x.typed_data(), w.typed_data(), y->typed_data(), num_t, num_f, num_d);
  const int64_t worth = num_t * num_f * num_d / kMultiplicationsPerTask;
  const int64_t threads = std::min(pool.num_threads(), worth);
  if (threads <= 1) {
    product.Columns(0, num_f);
    return xla::ffi::Error::Success();
  }
  const int64_t wanted = std::min(kTasksPerThread * threads, worth);
  const int64_t tiles = (num_f + Isa::kCols - 1) / Isa::kCols;
  const int64_t columns = (tiles + wanted - 1) / wanted * Isa::kCols;
  const int64_t num_tasks = (num_f + columns - 1) / columns;
  std::shared_ptr<Shared> shared(new Shared{std::move(product), columns, num_tasks});
  for (int64_t i = 1; i < std::min(threads, num_tasks); ++i) {
    pool.Schedule([shared] { shared->Work(); });
  }
  shared->Work();
  shared->Wait();
  return xla::ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(effjax_int8_dot, Dot,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>());

// The same product on one thread, without XLA: for checking what was built.
extern "C" void effjax_int8_dot_plain(const int8_t* x, const int8_t* w, int32_t* y,
                                      int64_t num_t, int64_t num_f, int64_t num_d) {
  Product(x, w, y, num_t, num_f, num_d).Columns(0, num_f);
}
