// Shared memory with a shadow: every access is checked for bounds, for reads of what nobody wrote in this block, and
// for races. Two accesses to one element race when different threads make them, at least one writes, not both are
// atomic, and neither a __syncthreads nor (within one warp) a __syncwarp lies between them.
#pragma once
#include "fibers.h"

namespace emulation {

// One remembered access. Epochs start at 1, so a zero record never conflicts.
struct Access {
  uint64_t barrier_epoch = 0, warp_epoch = 0;
  unsigned thread = 0;

  static Access now() {
    Block& b = block();
    return {b.barrier_epoch, b.warp().sync_epoch, b.current->linear};
  }
  bool unordered_with(const Access& later) const {
    if (barrier_epoch != later.barrier_epoch || thread == later.thread) return false;
    return thread / kWarp != later.thread / kWarp || warp_epoch == later.warp_epoch;
  }
};

struct Shadow {
  Access written, updated;      // last plain write, last atomic
  Access read, read_elsewhere;  // last read, last read by another thread than `read`
  bool initialised = false;

  void remember_read(const Access& a) {
    if (read.thread != a.thread) read_elsewhere = read;
    read = a;
  }
};

template <class T>
struct SharedSpan {
  T* data;
  Shadow* shadow;
  long size;
  const char* name;

  [[noreturn]] void complain(const char* what, long i) const {
    fail(std::string(what) + " of shared " + name + "[" + std::to_string(i) + "]");
  }
  Shadow& at(long i) const {
    if (i < 0 || i >= size) complain("access out of bounds", i);
    return shadow[i];
  }
  T read(long i) const {
    Shadow& s = at(i);
    const Access now = Access::now();
    if (!s.initialised) complain("uninitialised read", i);
    if (s.written.unordered_with(now) || s.updated.unordered_with(now)) complain("race: read after write", i);
    s.remember_read(now);
    return data[i];
  }
  void write(long i, T value) const {
    Shadow& s = at(i);
    const Access now = Access::now();
    if (s.written.unordered_with(now) || s.updated.unordered_with(now)) complain("race: write after write", i);
    check_readers(s, now, i);
    s.written = now;
    s.initialised = true;
    data[i] = value;
  }
  T atomic_add(long i, T value) const {
    Shadow& s = at(i);
    const Access now = Access::now();
    if (!s.initialised) complain("uninitialised read", i);
    if (s.written.unordered_with(now)) complain("race: atomic after write", i);
    check_readers(s, now, i);
    s.updated = now;
    const T old = data[i];
    data[i] = old + value;
    return old;
  }

 private:
  void check_readers(const Shadow& s, const Access& now, long i) const {
    if (s.read.unordered_with(now) || s.read_elsewhere.unordered_with(now)) complain("race: write after read", i);
  }
};

template <class T>
class SharedPtr;

template <class T>
class SharedRef {
 public:
  SharedRef(const SharedSpan<T>& span, long i) : span_(span), i_(i) {}
  operator T() const { return span_.read(i_); }
  T operator=(T value) const { return span_.write(i_, value), value; }
  T operator=(const SharedRef& other) const { return *this = static_cast<T>(other); }
  T operator+=(T value) const { return *this = static_cast<T>(*this) + value; }
  SharedPtr<T> operator&() const { return SharedPtr<T>(span_, i_); }

 private:
  SharedSpan<T> span_;
  long i_;
};

// Stands where device code has a T* to shared memory.
template <class T>
class SharedPtr {
 public:
  SharedPtr(const SharedSpan<T>& span, long offset) : span_(span), offset_(offset) {}
  SharedRef<T> operator[](long i) const { return {span_, offset_ + i}; }
  SharedPtr operator+(long n) const { return {span_, offset_ + n}; }
  T atomic_add(T value) const { return span_.atomic_add(offset_, value); }

 private:
  SharedSpan<T> span_;
  long offset_;
};

// The first thread that asks allocates; `tag` tells one variable from another.
template <class T>
SharedPtr<T> shared_array(const void* tag, long size, const char* name) {
  Block& b = block();
  for (const SharedAllocation& a : b.shared) {
    if (a.tag == tag) {
      return {{reinterpret_cast<T*>(a.bytes.get()), static_cast<Shadow*>(a.shadow.get()), size, name}, 0};
    }
  }
  const size_t bytes = size * sizeof(T);
  b.shared_bytes += bytes;
  if (b.shared_bytes > (48 << 10)) fail("more than 48 KiB of shared memory");
  SharedAllocation a{tag, std::make_unique<char[]>(bytes + 1), std::shared_ptr<Shadow[]>(new Shadow[size + 1])};
  std::memset(a.bytes.get(), 0xCD, bytes);
  b.shared.push_back(std::move(a));
  const SharedAllocation& kept = b.shared.back();
  return {{reinterpret_cast<T*>(kept.bytes.get()), static_cast<Shadow*>(kept.shadow.get()), size, name}, 0};
}

template <class T>
SharedPtr<T> dynamic_shared_array(const char* name) {
  static const char tag = 0;
  return shared_array<T>(&tag, block().dynamic_bytes / sizeof(T), name);
}

}  // namespace emulation
