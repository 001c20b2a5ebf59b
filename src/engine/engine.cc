#include "engine/engine.h"

#include <algorithm>

#include "base/check.h"
#include "base/shapes.h"

namespace uly::engine {

void Engine::begin_run(const ops::Places& places) {
  run_places_ = places;
  run_base_ = reserve(ops::Life::kRun, places.arena_bytes);
  made_run_ = 0;
}

void Engine::reserve_step(int64_t bytes) {
  if (bytes <= step_bytes_) return;
  step_base_ = reserve(ops::Life::kStep, bytes);
  step_bytes_ = bytes;
}

void Engine::begin_step(const ops::Places& places, BatchData batch, int64_t document_table_bytes) {
  reserve_step(places.arena_bytes);
  step_places_ = &places;
  made_step_ = 0;
  alive_ = 0;
  works_.clear();
  batch_ = std::move(batch);
  const auto make_input = [&](int64_t rows, int64_t columns, Dtype dtype, const char* what) { return make(rows, columns, dtype, ops::Kind::kInputs, what, ops::Life::kStep, ops::Tier::kDevice); };
  for (ops::Buffer& b : inputs_) b = make_input(static_cast<int64_t>(batch_.ids.size()), 1, Dtype::kI64, "token ids, labels, positions");
  load_batch(document_table_bytes > 0 ? make_input(1, document_table_bytes, Dtype::kU8, "table of documents") : ops::Buffer{});
}

ops::Buffer Engine::make(int64_t rows, int64_t columns, Dtype dtype, ops::Kind, std::string_view what, ops::Life life, ops::Tier tier) {
  const bool run = life == ops::Life::kRun;
  const ops::Places& places = run ? run_places_ : *step_places_;
  const size_t n = run ? made_run_++ : made_step_++;
  ops::Buffer b{.id = static_cast<int32_t>(n), .life = life, .tier = tier, .dtype = dtype, .offset = 0, .rows = rows, .columns = columns, .stride = columns};
  if (n >= places.bytes.size() || places.bytes[n] != b.bytes())
    throw InternalError(fmt::format("{}: buffer {} ({}) has {} bytes, priced were {}", where(), n, what, b.bytes(), n < places.bytes.size() ? places.bytes[n] : -1));
  if (run) return b;
  alive_ += round_up(b.bytes(), ops::kPlaceAlignment);
  peak_alive_ = std::max(peak_alive_, alive_);
  peak_placed_ = std::max(peak_placed_, places.offset_bytes[n] + round_up(b.bytes(), ops::kPlaceAlignment));
  return b;
}

void Engine::release(const ops::Buffer& b) { alive_ -= round_up(step_places_->bytes[static_cast<size_t>(b.id)], ops::kPlaceAlignment); }

void* Engine::address(const ops::Buffer& b) const {
  const bool run = b.life == ops::Life::kRun;
  const ops::Places& places = run ? run_places_ : *step_places_;
  return (run ? run_base_ : step_base_) + places.offset_bytes[static_cast<size_t>(b.id)] + b.offset * bytes_of(b.dtype);
}

kernels::Matrix Engine::matrix(const ops::Buffer& b) const {
  if (!b.exists()) return {};
  return {.data = address(b), .dtype = b.dtype, .rows = b.rows, .columns = b.columns, .stride = b.stride};
}

double Engine::scalar(const ops::Buffer& b) {
  ULY_CHECK(b.dtype == Dtype::kF64 && b.elements() == 1, "a scalar is one fp64");
  double value = 0;
  read(&value, b);
  return value;
}

void Engine::mark(std::string_view where, int64_t layer) {
  where_ = where;
  layer_ = layer;
}

std::string Engine::where() const { return layer_ < 0 ? where_ : fmt::format("{}, layer {}", where_, layer_); }

ops::Event Engine::started(comm::Work work) {
  works_.push_back(std::move(work));
  return {static_cast<int32_t>(works_.size()) - 1};
}

void Engine::wait(ops::Event event) {
  if (event.id >= 0) works_[static_cast<size_t>(event.id)].wait();
}

kernels::AdamwArgs Engine::adamw_args(const ops::Buffer& weight, const ops::Buffer& master, const ops::Buffer& m, const ops::Buffer& v, const ops::Buffer& gradient, const ops::Buffer& norm, const ops::Buffer& loss,
                                      const ops::UpdateRange& range) const {
  const auto at = [&](const ops::Buffer& b) { return address(b.column_range(range.first, range.count)); };
  return {.weight = at(weight),
          .weight_dtype = weight.dtype,
          .master = master.dtype == Dtype::kF32 ? static_cast<float*>(at(master)) : nullptr,
          .low = master.dtype == Dtype::kI16 ? static_cast<int16_t*>(at(master)) : nullptr,
          .m = static_cast<float*>(at(m)),
          .v = static_cast<float*>(at(v)),
          .gradient = static_cast<float*>(at(gradient)),
          .count = range.count,
          .squared_norm = static_cast<const double*>(address(norm)),
          .loss = static_cast<const double*>(address(loss)),
          .clip = update_.clip,
          .learning_rate = update_.learning_rate,
          .beta1 = update_.beta1,
          .beta2 = update_.beta2,
          .eps = update_.eps,
          .weight_decay = range.decays ? update_.weight_decay : 0.0,
          .step = update_.step};
}

std::vector<kernels::PackedColumns> packed_columns(const ops::ColumnBlocks& blocks, int64_t rows) {
  std::vector<kernels::PackedColumns> ranges;
  int64_t block_at = 0;
  for (const auto& block : blocks) {
    int64_t width = 0;
    for (const ops::Columns& c : block) width += c.count;
    int64_t at = block_at;
    for (const ops::Columns& c : block) {
      if (c.count > 0) ranges.push_back({.first = c.first, .count = c.count, .at = at, .stride = width});
      at += c.count;
    }
    block_at += rows * width;
  }
  return ranges;
}

std::vector<int64_t> in_bytes(std::vector<int64_t> elements, Dtype dtype) {
  for (int64_t& n : elements) n *= bytes_of(dtype);
  return elements;
}

}  // namespace uly::engine
