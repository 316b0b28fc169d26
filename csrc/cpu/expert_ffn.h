// The experts' networks over rows, as items that threads of one region take in turns, among other work of theirs.
#pragma once
#include <ATen/ATen.h>

#include <functional>
#include <memory>

#include "activation.h"
#include "ffn_weights.h"
#include "forward.h"
#include "parallel.h"
#include "segments.h"

namespace tutelx {

// What is done with the finished rows [R,M]: items for any thread.
struct Then {
  int64_t items = 0;
  std::function<void(const at::Tensor& out, int64_t item)> item;
};

class FfnTask {
 public:
  virtual ~FfnTask() = default;

  // What is expected of progress, of which the parts 0..E are this task's, is known before an item is taken. An item
  // may wait for those before it.
  virtual int64_t items() const = 0;
  virtual void item(int64_t i) = 0;
  virtual Forward result() const = 0;
};

// keep: the pre-activations, for a backward. What is given here must outlive the task.
std::unique_ptr<FfnTask> ffn_task(const Rows& x, const Segments& segments, const FfnWeights& weights, Act act,
                                  TileSize size, bool keep, at::TensorOptions options, const Then& then,
                                  Progress& progress);
// Whether x may be rows that slots name, so many of one expert at most.
bool takes_slots(const Matrix& x, int64_t most_rows, const FfnWeights& weights);
// What so many experts read and write, in bytes.
int64_t ffn_bytes(const FfnWeights& weights, int64_t experts, int64_t rows);

}  // namespace tutelx
