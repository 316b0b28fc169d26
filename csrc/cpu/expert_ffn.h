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

  // Before an item is taken. What is given here must outlive the task.
  virtual void begin(const Rows& x, const Segments& segments, const Then& then) = 0;
  // An item may wait for those before it.
  virtual int64_t items() const = 0;
  virtual void item(int64_t i) = 0;
  virtual Forward result() const = 0;
};

// rows: R. keep: the pre-activations, for a backward. The parts 0..E of progress are this task's. What is given here
// must outlive the task.
std::unique_ptr<FfnTask> ffn_task(int64_t rows, const FfnWeights& weights, Act act, TileSize size, bool keep,
                                  at::TensorOptions options, Progress& progress);
// Whether x may be rows that slots name, so many of one expert at most.
bool takes_slots(const Matrix& x, int64_t most_rows, const FfnWeights& weights);
// What so many experts read and write, in bytes.
int64_t ffn_bytes(const FfnWeights& weights, int64_t experts, int64_t rows);

}  // namespace tutelx
