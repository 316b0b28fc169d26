// How the CPU ops use threads and vector units.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// One binary, compiled for three instruction sets; the loader picks. Needs ELF ifuncs.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define TUTELX_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TUTELX_SIMD
#endif
#define TUTELX_INLINE inline __attribute__((always_inline))

// Weak: present where torch was built with MKL.
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));

namespace tutelx {

// While it lives, MKL products called from this thread run on it alone. Inside a parallel region MKL would still cut a
// product for all threads, which costs time and makes the bits depend on the number of threads.
class OneThreadProducts {
 public:
  OneThreadProducts() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThreadProducts() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneThreadProducts(const OneThreadProducts&) = delete;
  OneThreadProducts& operator=(const OneThreadProducts&) = delete;

 private:
  int before_;  // 0: follow the global setting
};

// Fewer bytes are read, and fewer products summed, before a second thread is awake.
constexpr int64_t kWakeBytes = 262144, kWakeProducts = int64_t{1} << 21;

// Calls fn(i) once for every i in [0, n). Items go to whichever thread is free next, so uneven items balance
// themselves; what an item computes must not depend on the thread, which keeps the result bit-identical. much: whether
// the work lasts longer than it takes to wake a thread.
template <class Fn>
void parallel_items(int64_t n, const Fn& fn, bool much = true) {
  const int64_t threads = much ? std::min<int64_t>(n, at::get_num_threads()) : 1;
  if (threads <= 1 || at::in_parallel_region()) {
    const OneThreadProducts guard;
    for (int64_t i = 0; i < n; ++i) fn(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const OneThreadProducts guard;
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) fn(i);
  });
}

// How much is left of some parts of a task, where items of one wait for all of another.
class Progress {
 public:
  explicit Progress(int64_t parts) : left_(parts) {}

  void expect(int64_t part) { left_[part].fetch_add(1, std::memory_order_relaxed); }
  void finish(int64_t part) { left_[part].fetch_sub(1, std::memory_order_release); }
  // False if something failed that would have been part of it.
  bool wait(int64_t part) const {
    while (left_[part].load(std::memory_order_acquire) > 0) {
      if (failed()) return false;
      std::this_thread::yield();
    }
    return true;
  }
  void fail() { failed_.store(true); }
  bool failed() const { return failed_.load(std::memory_order_relaxed); }

 private:
  std::vector<std::atomic<int64_t>> left_;
  std::atomic<bool> failed_{false};
};

// Calls fn(is_caller) once on each of some threads, one of which is the caller, and there may be no other. They share
// their work themselves, and may wait for progress that a thread which runs is making. most: threads that there is work
// for at a time. bytes: that all of them read.
template <class Fn>
void parallel_team(int64_t most, int64_t bytes, Progress& progress, const Fn& fn) {
  const int64_t threads = std::min({most, int64_t{at::get_num_threads()}, 1 + bytes / kWakeBytes});
  if (threads <= 1 || at::in_parallel_region()) {
    const OneThreadProducts guard;
    fn(true);
    return;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    const OneThreadProducts guard;
    try {
      fn(begin == 0);
    } catch (...) {
      progress.fail();
      throw;
    }
  });
}

// Numbers from 0 on, each handed out once, in order.
class Turns {
 public:
  // Calls fn(i) for those below n that the calling thread gets. fn(i) may wait for what fn does for a smaller one.
  template <class Fn>
  void take(int64_t n, const Progress& progress, const Fn& fn) {
    for (int64_t i = next_.fetch_add(1); i < n && !progress.failed(); i = next_.fetch_add(1)) fn(i);
  }

 private:
  std::atomic<int64_t> next_{0};
};

// Splits [0, n) into contiguous ranges of about `grain` or more and calls fn(begin, end) once for each, in parallel.
// Some ranges a thread, so that one that woke late or was interrupted leaves more to the others.
template <class Fn>
void parallel_ranges(int64_t n, int64_t grain, const Fn& fn) {
  constexpr int64_t ranges_a_thread = 8;
  const int64_t ranges = std::min<int64_t>(n / std::max<int64_t>(1, grain), ranges_a_thread * at::get_num_threads());
  if (ranges <= 1) {
    if (n > 0) fn(int64_t{0}, n);
    return;
  }
  parallel_items(ranges, [&](int64_t i) { fn(n * i / ranges, n * (i + 1) / ranges); });
}

// Enough bytes to a task that threads are worth waking, few enough that they balance.
inline int64_t rows_per_task(int64_t row_bytes) {
  return std::max<int64_t>(1, 131072 / std::max<int64_t>(1, row_bytes));
}

}  // namespace tutelx
