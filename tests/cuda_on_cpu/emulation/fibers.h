// Runs a CUDA grid on the CPU: every CUDA thread is a fiber, every block is one task of an OpenMP loop.
//
// A fiber runs until it reaches a barrier or a warp collective, then the scheduler picks another one. The order is
// drawn from a seed, so a kernel that only works for one order of threads fails under some other seed.
//
// What a GPU would turn into a hang or a silent wrong answer is diagnosed: divergent barriers, collectives whose
// lanes disagree, lanes that have exited. A diagnosis ends the launch with an error and a message; it does not end
// the process.
#pragma once
#if !defined(__x86_64__)
#error "the CUDA emulation switches stacks with x86-64 assembly"
#endif

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned long count() const { return static_cast<unsigned long>(x) * y * z; }
};

namespace emulation {

using Site = std::source_location;

constexpr unsigned kWarp = 32;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// ---- The launch's outcome ------------------------------------------------------------------------------------------

struct Outcome {
  std::mutex lock;
  std::atomic<bool> failed{false};
  std::string message;  // the first diagnosis

  void record(const std::string& text) {
    std::lock_guard<std::mutex> guard(lock);
    if (!failed) message = text;
    failed = true;
  }
};
inline Outcome outcome;
inline unsigned long seed = 0;  // 0: threads in ascending order

// ---- Fibers --------------------------------------------------------------------------------------------------------

extern "C" void tutelx_emulation_switch(void** save_stack, void* next_stack);
asm(R"(.text
.weak tutelx_emulation_switch
.type tutelx_emulation_switch,@function
tutelx_emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

enum class State : uint8_t { ready, at_barrier, at_collective, finished };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 thread;
  unsigned linear = 0;
  State state = State::ready;
  Site site;                   // where it waits
  unsigned mask = 0;           // of the collective it waits in
  bool orders_memory = false;  // that collective is a __syncwarp: shuffles and votes do not order memory
};

struct Warp {
  uint64_t offered[kWarp];    // what each lane brings to the collective it waits in
  uint64_t published[kWarp];  // what the last completed collective handed round
  uint64_t sync_epoch = 1;    // counts the __syncwarp of all its lanes
};

// One allocation of shared memory; its shadow belongs to shared_memory.h.
struct SharedAllocation {
  const void* tag;
  std::unique_ptr<char[]> bytes;
  std::shared_ptr<void> shadow;
};

struct Block {
  dim3 index, dim, grid;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<SharedAllocation> shared;
  size_t dynamic_bytes = 0, shared_bytes = 0;
  uint64_t barrier_epoch = 0;
  int votes = 0, votes_published = 0;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;

  void* scheduler_stack_pointer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  char* stacks = nullptr;
  size_t stack_count = 0;
  bool abandoned = false;

  Warp& warp() { return warps[current->linear / kWarp]; }
  unsigned lane() const { return current->linear % kWarp; }
};

inline Block& block() {
  static thread_local Block the_block;
  return the_block;
}

inline std::string where(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

inline std::string name_of(const dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

inline void switch_to_scheduler() {
  Block& b = block();
  Fiber* self = b.current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(self->state == State::finished ? nullptr : &fake, b.scheduler_stack,
                                 b.scheduler_stack_bytes);
#endif
  tutelx_emulation_switch(&self->stack_pointer, b.scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void switch_to_fiber(Block& b, Fiber& f) {
  b.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack, kStackBytes);
#endif
  tutelx_emulation_switch(&b.scheduler_stack_pointer, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Called from a fiber: records the diagnosis and leaves the block for good.
[[noreturn]] inline void fail(const std::string& what) {
  Block& b = block();
  outcome.record(what + " [block " + name_of(b.index) + " thread " + name_of(b.current->thread) + "]");
  b.abandoned = true;
  switch_to_scheduler();
  std::abort();  // an abandoned fiber is never resumed
}

inline void fiber_main() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_bytes);
#endif
  (*b.body)();
  block().current->state = State::finished;
  switch_to_scheduler();
  std::abort();
}

// ---- The scheduler of one block ------------------------------------------------------------------------------------

class Scheduler {
 public:
  Scheduler(Block& b, unsigned long block_seed) : b_(b), shuffle_(seed != 0), random_(block_seed) {}

  void run() {
    create_fibers();
    std::vector<unsigned> order(b_.warps.size());
    for (unsigned w = 0; w < order.size(); ++w) order[w] = w;
    while (!b_.abandoned && !outcome.failed) {
      if (shuffle_) std::shuffle(order.begin(), order.end(), random_);
      bool progress = false;
      for (unsigned w : order) progress |= advance_warp(w);
      if (b_.abandoned) return;
      const auto finished = count(State::finished);
      if (finished == b_.fibers.size()) return;
      if (count(State::at_barrier) == b_.fibers.size()) {
        release_barrier();
      } else if (!progress) {
        return diagnose_deadlock();
      }
    }
  }

 private:
  void create_fibers() {
    const size_t n = b_.dim.count();
    if (b_.stack_count < n) {
      if (b_.stacks) munmap(b_.stacks, b_.stack_count * kStackBytes);
      void* pool =
          mmap(nullptr, n * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (pool == MAP_FAILED) std::abort();
      b_.stacks = static_cast<char*>(pool);
      b_.stack_count = n;
    }
#if defined(__SANITIZE_ADDRESS__)
    // Fibers never return from their first frame: what the previous block poisoned must be cleared by hand.
    __asan_unpoison_memory_region(b_.stacks, n * kStackBytes);
#endif
    b_.fibers.assign(n, Fiber());
    b_.warps.assign((n + kWarp - 1) / kWarp, Warp());
    b_.abandoned = false;
    for (size_t i = 0; i < n; ++i) {
      Fiber& f = b_.fibers[i];
      f.linear = static_cast<unsigned>(i);
      f.thread = dim3(i % b_.dim.x, i / b_.dim.x % b_.dim.y, i / (static_cast<size_t>(b_.dim.x) * b_.dim.y));
      f.stack = b_.stacks + i * kStackBytes;
      void** top = reinterpret_cast<void**>(f.stack + kStackBytes - 64);
      *--top = nullptr;  // fiber_main never returns
      *--top = reinterpret_cast<void*>(&fiber_main);
      for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
      f.stack_pointer = top;
    }
    lane_order_.resize(kWarp);
    for (unsigned l = 0; l < kWarp; ++l) lane_order_[l] = l;
    if (shuffle_) std::shuffle(lane_order_.begin(), lane_order_.end(), random_);
  }

  // Runs one warp until all its lanes wait for the block, or, under a seed, until it is preempted.
  bool advance_warp(unsigned w) {
    bool progress = false;
    for (;;) {
      const bool stepped = run_ready_lanes(w);
      if (b_.abandoned) return true;
      const bool released = release_collectives(w);
      progress |= stepped || released;
      if (b_.abandoned || !released) return progress;
      if (shuffle_ && random_() % 4 == 0) return true;
    }
  }

  bool run_ready_lanes(unsigned w) {
    bool ran = false;
    const unsigned shift = shuffle_ ? random_() % kWarp : 0;
    for (unsigned l = 0; l < kWarp; ++l) {
      const size_t i = w * kWarp + lane_order_[(l + shift) % kWarp];
      if (i >= b_.fibers.size() || b_.fibers[i].state != State::ready) continue;
      switch_to_fiber(b_, b_.fibers[i]);
      if (b_.abandoned) return true;
      ran = true;
    }
    return ran;
  }

  bool release_collectives(unsigned w) {
    bool released = false;
    const size_t first = w * kWarp, last = std::min(b_.fibers.size(), first + kWarp);
    for (size_t i = first; i < last; ++i) {
      if (b_.fibers[i].state != State::at_collective) continue;
      const Fiber& f = b_.fibers[i];
      bool complete = true;
      for (size_t j = first; j < last && complete; ++j) {
        if (!(f.mask >> (j - first) & 1)) continue;
        const Fiber& other = b_.fibers[j];
        if (other.state == State::finished) return stop(f, "warp collective names an exited lane");
        complete = other.state == State::at_collective;
        if (complete && (other.mask != f.mask || other.site.line() != f.site.line())) {
          return stop(f, "lanes of a warp wait in different collectives, the other in " + where(other.site));
        }
      }
      if (!complete) continue;
      const unsigned everyone = last - first == kWarp ? ~0u : (1u << (last - first)) - 1;
      b_.warps[w].sync_epoch += f.orders_memory && (f.mask & everyone) == everyone;
      for (size_t j = first; j < last; ++j) {
        if (!(f.mask >> (j - first) & 1)) continue;
        b_.warps[w].published[j - first] = b_.warps[w].offered[j - first];
        b_.fibers[j].state = State::ready;
      }
      released = true;
    }
    return released;
  }

  void release_barrier() {
    for (const Fiber& f : b_.fibers) {
      if (f.site.line() != b_.fibers[0].site.line()) {
        stop(f, "threads of a block wait in different barriers, another in " + where(b_.fibers[0].site));
        return;
      }
    }
    b_.votes_published = b_.votes;
    b_.votes = 0;
    ++b_.barrier_epoch;
    for (Fiber& f : b_.fibers) f.state = State::ready;
  }

  void diagnose_deadlock() {
    for (const Fiber& f : b_.fibers) {
      if (f.state == State::at_barrier) {
        stop(f, "divergent barrier: " + std::to_string(count(State::at_barrier)) + " threads wait, " +
                    std::to_string(count(State::finished)) + " have exited, " +
                    std::to_string(count(State::at_collective)) + " wait in a warp collective");
        return;
      }
    }
    for (const Fiber& f : b_.fibers) {
      if (f.state == State::at_collective) {
        stop(f, "divergent warp collective: lanes of its mask never arrive");
        return;
      }
    }
  }

  bool stop(const Fiber& f, const std::string& what) {
    outcome.record(where(f.site) + ": " + what + " [block " + name_of(b_.index) + " thread " + name_of(f.thread) + "]");
    b_.abandoned = true;
    return true;
  }

  size_t count(State s) const {
    return std::count_if(b_.fibers.begin(), b_.fibers.end(), [s](const Fiber& f) { return f.state == s; });
  }

  Block& b_;
  const bool shuffle_;
  std::mt19937_64 random_;
  std::vector<unsigned> lane_order_;
};

// ---- What a fiber can wait for -------------------------------------------------------------------------------------

inline void wait_barrier(const Site& site) {
  Fiber* self = block().current;
  self->state = State::at_barrier;
  self->site = site;
  switch_to_scheduler();
}

// Hands `value` round among the lanes of `mask`; afterwards the warp's `published` holds one value a lane.
template <class T>
const uint64_t* exchange(unsigned mask, T value, const Site& site, bool orders_memory = false) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane exchanges at most 64 bits");
  Block& b = block();
  if (!(mask >> b.lane() & 1)) fail(where(site) + ": the calling lane is not in the mask");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  b.warp().offered[b.lane()] = bits;
  b.current->state = State::at_collective;
  b.current->site = site;
  b.current->mask = mask;
  b.current->orders_memory = orders_memory;
  switch_to_scheduler();
  return block().warp().published;
}

template <class T>
T take(const uint64_t* published, unsigned lane) {
  T value;
  std::memcpy(&value, &published[lane], sizeof(T));
  return value;
}

// The lanes of `mask` that exist: the last warp of a block may be partial.
inline unsigned existing(unsigned mask) {
  const Block& b = block();
  const size_t rest = b.fibers.size() - b.current->linear / kWarp * kWarp;
  return rest >= kWarp ? mask : mask & ((1u << rest) - 1);
}

// ---- The launch ----------------------------------------------------------------------------------------------------

inline void launch(dim3 grid, dim3 dim, size_t dynamic_bytes, const std::function<void()>& body) {
  if (outcome.failed) return;
  if (grid.count() == 0 || dim.count() == 0 || dim.count() > 1024 || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffffu || dynamic_bytes > (48 << 10)) {
    outcome.record("invalid launch configuration: grid " + name_of(grid) + " block " + name_of(dim) +
                   " dynamic shared bytes " + std::to_string(dynamic_bytes));
    return;
  }
  const long blocks = static_cast<long>(grid.count());
#pragma omp parallel for schedule(dynamic) if (blocks >= 16)
  for (long i = 0; i < blocks; ++i) {
    if (outcome.failed) continue;
    const long which = seed % 2 ? blocks - 1 - i : i;  // blocks have no order either
    Block& b = block();
    b.grid = grid;
    b.dim = dim;
    b.index = dim3(which % grid.x, which / grid.x % grid.y, which / (static_cast<long>(grid.x) * grid.y));
    b.body = &body;
    b.shared.clear();
    b.shared_bytes = 0;
    b.dynamic_bytes = dynamic_bytes;
    b.barrier_epoch = 1;
    Scheduler(b, seed * 1000003 + which).run();
  }
}

template <class Kernel>
struct Launcher {
  Kernel kernel;
  dim3 grid, dim;
  size_t dynamic_bytes;

  template <class... Arguments>
  void operator()(Arguments... arguments) const {
    launch(grid, dim, dynamic_bytes, [=, k = kernel] { k(arguments...); });
  }
};

template <class Kernel>
Launcher<Kernel> launcher(Kernel kernel, dim3 grid, dim3 dim, size_t dynamic_bytes) {
  return {kernel, grid, dim, dynamic_bytes};
}

}  // namespace emulation
