#include "buffers.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace tutelx {
namespace {

constexpr size_t kSmallest = size_t{1} << 17;  // smaller blocks cost malloc little, whatever it has given back

// Sizes in steps of an eighth of their power of two, so that nearly equal requests share their blocks.
size_t size_class(size_t bytes) {
  size_t power = kSmallest;
  while (power * 2 <= bytes) power *= 2;
  const size_t step = power / 8;
  return (bytes + step - 1) / step * step;
}

// Free blocks by size; beyond the limit those that lay idle longest go back to the system.
class FreeBlocks {
 public:
  void* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = by_size_.find(size);
    if (found == by_size_.end() || found->second.empty()) return nullptr;
    const auto newest = found->second.back();
    found->second.pop_back();
    void* const block = newest->block;
    idle_.erase(newest);
    bytes_ -= size;
    return block;
  }

  void give(void* block, size_t size) {
    std::list<Block> out;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      idle_.push_back({block, size});
      by_size_[size].push_back(std::prev(idle_.end()));
      bytes_ += size;
      out = drop_beyond(limit_);
    }
    release(out);
  }

  void set_limit(size_t bytes) {
    std::list<Block> out;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      limit_ = bytes;
      out = drop_beyond(bytes);
    }
    release(out);
  }

  void clear() {
    std::list<Block> out;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      out = drop_beyond(0);
    }
    release(out);
  }

  size_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Block {
    void* block;
    size_t size;
  };

  std::list<Block> drop_beyond(size_t limit) {
    std::list<Block> out;
    while (bytes_ > limit) {
      const auto oldest = idle_.begin();
      std::vector<std::list<Block>::iterator>& peers = by_size_[oldest->size];
      peers.erase(std::find(peers.begin(), peers.end(), oldest));
      bytes_ -= oldest->size;
      out.splice(out.end(), idle_, oldest);
    }
    return out;
  }

  static void release(const std::list<Block>& blocks) {
    for (const Block& b : blocks) c10::free_cpu(b.block);
  }

  std::mutex mutex_;
  std::list<Block> idle_;  // longest idle first
  std::unordered_map<size_t, std::vector<std::list<Block>::iterator>> by_size_;
  size_t bytes_ = 0, limit_ = size_t{1} << 30;
};

FreeBlocks& free_blocks() {
  // Never destroyed: tensors may outlive static objects. A forked child must not inherit a locked mutex.
  static FreeBlocks* const blocks = [] {
    pthread_atfork([] { free_blocks().mutex().lock(); }, [] { free_blocks().mutex().unlock(); },
                   [] { free_blocks().mutex().unlock(); });
    return new FreeBlocks;
  }();
  return *blocks;
}

// On huge pages where the system has them: rows are visited in any order, and each would miss the page table's cache.
void* new_block(size_t size) {
  void* const block = c10::alloc_cpu(size);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + page - 1) / page * page,
                  end = (reinterpret_cast<uintptr_t>(block) + size) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#endif
  return block;
}

struct Lent {
  void* block;
  size_t size;
};

void give_back(void* context) {
  const Lent* const lent = static_cast<Lent*>(context);
  free_blocks().give(lent->block, lent->size);
  delete lent;
}

class BufferAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest) return c10::GetCPUAllocator()->allocate(bytes);
    const size_t size = size_class(bytes);
    void* block = free_blocks().take(size);
    if (!block) block = new_block(size);
    return {block, new Lent{block, size}, &give_back, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

BufferAllocator& allocator() {
  static BufferAllocator* const one = new BufferAllocator;
  return *one;
}

void set_buffer_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "bytes=", bytes, " must be at least 0");
  free_blocks().set_limit(static_cast<size_t>(bytes));
}
void release_buffers() { free_blocks().clear(); }
int64_t idle_buffer_bytes() { return static_cast<int64_t>(free_blocks().bytes()); }

}  // namespace

at::Tensor buffer(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::detail::empty_generic(sizes, &allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

at::Tensor buffer_like(const at::Tensor& like) {
  if (!like.is_non_overlapping_and_dense()) return at::empty_like(like);
  const at::Tensor out = buffer(like.sizes(), like.options());
  return like.is_contiguous() ? out : out.as_strided(like.sizes(), like.strides());
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CompositeExplicitAutograd, m) {
  m.impl("set_buffer_limit", &tutelx::set_buffer_limit);
  m.impl("release_buffers", &tutelx::release_buffers);
  m.impl("idle_buffer_bytes", &tutelx::idle_buffer_bytes);
}
