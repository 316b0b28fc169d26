// route: which row does each (token, choice) slot get. Count -> scan -> scatter over chunks of the slot sequence.
//
// The sequence is all first choices of all tokens, then all second choices, ...; a slot's location is the number of
// earlier slots of the sequence with the same expert. A chunk is ranked by one block, stably: each of its warps owns a
// contiguous piece, visits it in order, 32 slots a step, and counts in a histogram of its own.
#include <algorithm>

#include "common.cuh"

namespace tutelx::kernels {
namespace {

constexpr int kBlock = 256;
constexpr int kMaxWarps = kBlock / kWarpSize;
constexpr int kSharedInts = (48 << 10) / sizeof(int32_t) - 64;  // what needs no opt-in, less the small static arrays
static_assert(2 * kRouteMaxExperts <= kSharedInts, "offsets and one histogram must fit");
constexpr int64_t kOneChunkSlots = 4096;  // up to here one block does it all, in one launch

struct Plan {
  int32_t chunks, chunk;  // chunk: slots, a multiple of 32 * warps
  int32_t warps;          // histograms that fit beside the offsets
};

// At least E slots a chunk bounds the chunks' counts by T*K + E; about 512 chunks fill any device.
Plan plan_for(int64_t slots, int64_t E) {
  Plan plan{1, 0, kMaxWarps};
  while (plan.warps > 1 && (plan.warps + 1) * E > kSharedInts) plan.warps /= 2;
  int64_t chunk = slots;
  if (slots > kOneChunkSlots) chunk = std::max<int64_t>({ceil_div<int64_t>(slots, 512), 1024, E});
  chunk = ceil_div<int64_t>(std::max<int64_t>(chunk, 1), kBlock) * kBlock;
  plan.chunk = static_cast<int32_t>(chunk);
  plan.chunks = static_cast<int32_t>(std::max<int64_t>(ceil_div(slots, chunk), 1));
  return plan;
}

// The slot sequence.
struct Slots {
  const int32_t* expert_ids;
  const int32_t* order;
  int32_t T, K, E;

  __device__ __forceinline__ int32_t count() const { return T * K; }
  // Place in expert_ids of the i-th slot of the sequence.
  __device__ __forceinline__ int32_t place(int32_t i) const {
    const int32_t k = i / T;
    int32_t t = i - k * T;
    if (order) {
      t = order[t];
      TUTELX_DEVICE_ASSERT(t >= 0 && t < T, "route: order names a token outside [0, T)");
    }
    return t * K + k;
  }
  __device__ __forceinline__ int32_t expert(int32_t place) const {
    const int32_t e = expert_ids[place];
    TUTELX_DEVICE_ASSERT(e >= -1 && e < E, "route: expert id outside [-1, num_experts)");
    return e;
  }
};

// chunk_counts[e][c]: slots of chunk c that ask for expert e.
__global__ void __launch_bounds__(kBlock) count_kernel(Slots slots, Plan plan, int32_t* __restrict__ chunk_counts) {
  TUTELX_DYNAMIC_SHARED(int32_t, histogram);  // [E]
  for (int e = threadIdx.x; e < slots.E; e += kBlock) histogram[e] = 0;
  __syncthreads();
  const int32_t begin = blockIdx.x * plan.chunk;
  const int32_t end = min(begin + plan.chunk, slots.count());
  for (int32_t i = begin + threadIdx.x; i < end; i += kBlock) {
    const int32_t e = slots.expert(slots.place(i));
    if (e >= 0) atomicAdd(&histogram[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < slots.E; e += kBlock) {
    chunk_counts[static_cast<int64_t>(e) * plan.chunks + blockIdx.x] = histogram[e];
  }
}

__device__ __forceinline__ int32_t warp_inclusive_scan(int32_t x, int lane) {
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

// One warp an expert: turns its chunk counts into exclusive prefix sums, in place, and writes the total.
__global__ void __launch_bounds__(kBlock)
    scan_kernel(int32_t E, int32_t chunks, int32_t* __restrict__ chunk_counts, int32_t* __restrict__ counts) {
  const int e = blockIdx.x * kMaxWarps + threadIdx.x / kWarpSize;
  if (e >= E) return;  // whole warps
  const int lane = threadIdx.x % kWarpSize;
  int32_t* mine = chunk_counts + static_cast<int64_t>(e) * chunks;
  int32_t before = 0;
  for (int32_t c0 = 0; c0 < chunks; c0 += kWarpSize) {
    const int32_t c = c0 + lane;
    const int32_t n = c < chunks ? mine[c] : 0;
    const int32_t upto = warp_inclusive_scan(n, lane);
    if (c < chunks) mine[c] = before + upto - n;
    before += __shfl_sync(kAllLanes, upto, kWarpSize - 1);
  }
  if (lane == 0) counts[e] = before;
}

// Turns values [n] into exclusive prefix sums, in place; returns the total to every thread.
__device__ int32_t block_exclusive_scan(SharedPtr<int32_t> values, int32_t n, SharedPtr<int32_t> warp_totals) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  int32_t before = 0;
  for (int32_t base = 0; base < n; base += blockDim.x) {
    const int32_t i = base + threadIdx.x;
    const int32_t x = i < n ? static_cast<int32_t>(values[i]) : 0;
    const int32_t upto = warp_inclusive_scan(x, lane);
    if (lane == kWarpSize - 1) warp_totals[warp] = upto;
    __syncthreads();
    int32_t lower_warps = 0, all_warps = 0;
    for (int w = 0; w < warps; ++w) {
      const int32_t total = warp_totals[w];
      if (w < warp) lower_warps += total;
      all_warps += total;
    }
    if (i < n) values[i] = before + lower_warps + upto - x;
    before += all_warps;
    __syncthreads();  // before the next round overwrites warp_totals
  }
  return before;
}

// What the scatter writes besides the map itself.
struct Layout {
  int64_t capacity;  // negative: unlimited
  bool padded;
  int32_t R;
  int32_t* dest;
  int32_t* source;
  int32_t* counts;
  int32_t* offsets;
};

// Calls visit(place, expert) for the warp's piece of the chunk, 32 slots a step, in order. Lanes without a slot or
// with an unused one see expert -1; all lanes take part in every call.
template <class Visit>
__device__ __forceinline__ void visit_piece(const Slots& slots, const Plan& plan, const Visit& visit) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int32_t piece = plan.chunk / plan.warps;
  const int32_t begin = blockIdx.x * plan.chunk + warp * piece;
  const int32_t end = min(begin + piece, slots.count());
  for (int32_t i0 = begin; i0 < end; i0 += kWarpSize) {
    const int32_t i = i0 + lane;
    const int32_t place = i < end ? slots.place(i) : -1;
    visit(place, place >= 0 ? slots.expert(place) : -1);
  }
}

// Blocks beyond the chunks only help to mark empty rows.
__global__ void __launch_bounds__(kBlock)
    scatter_kernel(Slots slots, Plan plan, Layout out, const int32_t* __restrict__ chunk_bases, bool counted) {
  TUTELX_DYNAMIC_SHARED(int32_t, memory);
  TUTELX_SHARED(int32_t, warp_totals, kMaxWarps);
  const int32_t E = slots.E;
  const SharedPtr<int32_t> offsets = memory + 0;     // [E]
  const SharedPtr<int32_t> histograms = memory + E;  // [warps][E]
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, threads = blockDim.x;
  const SharedPtr<int32_t> histogram = histograms + warp * E;
  const bool has_chunk = static_cast<int32_t>(blockIdx.x) < plan.chunks;

  // 1. Each warp counts its piece. One lane speaks for all lanes with its expert.
  for (int i = threadIdx.x; i < plan.warps * E; i += threads) histograms[i] = 0;
  __syncthreads();
  if (has_chunk) {
    visit_piece(slots, plan, [&](int32_t, int32_t e) {
      const unsigned same = __match_any_sync(kAllLanes, e);
      if (e >= 0 && lane == __ffs(same) - 1) histogram[e] += __popc(same);
      __syncwarp();
    });
  }
  __syncthreads();

  // 2. Histograms become the first location of each warp; offsets hold what each expert keeps, then its first row.
  for (int32_t e = threadIdx.x; e < E; e += threads) {
    int32_t location = counted && has_chunk ? chunk_bases[static_cast<int64_t>(e) * plan.chunks + blockIdx.x] : 0;
    for (int w = 0; w < plan.warps; ++w) {
      const int32_t n = histograms[w * E + e];
      histograms[w * E + e] = location;
      location += n;
    }
    int32_t count = location;
    if (counted) count = out.counts[e];
    if (!counted && blockIdx.x == 0) out.counts[e] = count;
    if (out.padded) {
      offsets[e] = static_cast<int32_t>(out.capacity);
    } else {
      offsets[e] = out.capacity < 0 || count < out.capacity ? count : static_cast<int32_t>(out.capacity);
    }
  }
  __syncthreads();
  const int32_t total = block_exclusive_scan(offsets, E, warp_totals);
  if (blockIdx.x == 0) {
    for (int32_t e = threadIdx.x; e < E; e += threads) out.offsets[e] = offsets[e];
    if (threadIdx.x == 0) out.offsets[E] = total;
  }

  // 3. The same walk again, now with locations.
  if (has_chunk) {
    visit_piece(slots, plan, [&](int32_t place, int32_t e) {
      const unsigned same = __match_any_sync(kAllLanes, e);
      const int32_t rank = __popc(same & ((1u << lane) - 1));
      const int32_t location = e >= 0 ? static_cast<int32_t>(histogram[e]) + rank : 0;
      __syncwarp();
      if (e >= 0 && rank == 0) histogram[e] = location + __popc(same);
      __syncwarp();
      if (place < 0) return;
      const bool kept = e >= 0 && (out.capacity < 0 || location < out.capacity);
      const int32_t row = kept ? static_cast<int32_t>(offsets[e]) + location : -1;
      out.dest[place] = row;
      if (kept) out.source[row] = place;
    });
  }

  // 4. Empty rows: behind the last kept one (ragged), or behind each expert's last (padded).
  const int32_t first = out.padded ? 0 : total;
  for (int64_t r = first + static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; r < out.R;
       r += static_cast<int64_t>(gridDim.x) * threads) {
    const int32_t e = out.padded ? static_cast<int32_t>(r / out.capacity) : 0;
    if (!out.padded || r % out.capacity >= out.counts[e]) out.source[r] = -1;
  }
}

bool valid(const RouteArguments& a) {
  if (a.T < 0 || a.K < 0 || a.E < 1 || a.E > kRouteMaxExperts) return false;
  if (a.padded && a.capacity < 0) return false;
  const int64_t limit = INT32_MAX - (int64_t{1} << 23);  // room for rounding up to a whole chunk
  const int64_t R = a.padded ? a.capacity * a.E : 0;
  return a.T <= limit && a.K <= limit && a.T * a.K <= limit && a.capacity <= limit && R <= limit;
}

Slots slots_of(const RouteArguments& a) {
  return {a.expert_ids, a.order, static_cast<int32_t>(a.T), static_cast<int32_t>(a.K), static_cast<int32_t>(a.E)};
}

cudaError_t launch_scatter(const RouteArguments& a, bool counted, cudaStream_t stream) {
  const Plan plan = plan_for(a.T * a.K, a.E);
  const int64_t R = a.padded ? a.E * a.capacity : a.T * a.K;
  const Layout out{a.capacity, a.padded, static_cast<int32_t>(R), a.dest, a.source, a.counts, a.offsets};
  // Without counted totals only a single block knows them all.
  const int64_t filling = counted ? std::min<int64_t>(ceil_div<int64_t>(R, 16 * kBlock), 1024) : 1;
  const unsigned blocks = static_cast<unsigned>(std::max<int64_t>(plan.chunks, filling));
  const size_t shared = (plan.warps + 1) * a.E * sizeof(int32_t);
  TUTELX_LAUNCH(scatter_kernel, blocks, plan.warps * kWarpSize, shared, stream)
  (slots_of(a), plan, out, static_cast<const int32_t*>(a.scratch), counted);
  return cudaGetLastError();
}

}  // namespace

size_t route_scratch_bytes(int64_t T, int64_t K, int64_t E) {
  return static_cast<size_t>(plan_for(T * K, E).chunks) * E * sizeof(int32_t);
}

cudaError_t launch_route_count(const RouteArguments& a, cudaStream_t stream) {
  if (!valid(a)) return cudaErrorInvalidValue;
  const Plan plan = plan_for(a.T * a.K, a.E);
  int32_t* chunk_counts = static_cast<int32_t*>(a.scratch);
  TUTELX_LAUNCH(count_kernel, plan.chunks, kBlock, a.E * sizeof(int32_t), stream)(slots_of(a), plan, chunk_counts);
  const int32_t E = static_cast<int32_t>(a.E);
  TUTELX_LAUNCH(scan_kernel, ceil_div(E, kMaxWarps), kBlock, 0, stream)(E, plan.chunks, chunk_counts, a.counts);
  return cudaGetLastError();
}

cudaError_t launch_route_assign(const RouteArguments& a, cudaStream_t stream) {
  return valid(a) ? launch_scatter(a, /*counted=*/true, stream) : cudaErrorInvalidValue;
}

cudaError_t launch_route(const RouteArguments& a, cudaStream_t stream) {
  if (!valid(a)) return cudaErrorInvalidValue;
  const bool one_chunk = plan_for(a.T * a.K, a.E).chunks == 1;
  const bool few_rows = !a.padded || a.E * a.capacity <= 16 * kOneChunkSlots;
  if (one_chunk && few_rows) return launch_scatter(a, /*counted=*/false, stream);
  const cudaError_t error = launch_route_count(a, stream);
  return error == cudaSuccess ? launch_route_assign(a, stream) : error;
}

}  // namespace tutelx::kernels
