#include "engine/engine.h"

#include <algorithm>

#include "base/check.h"
#include "base/shapes.h"

namespace uly::engine {

void Engine::begin_run(const ops::Places& places) {
  run_places_ = places;
  for (size_t t = 0; t < places.arena_bytes.size(); ++t) run_base_[t] = places.arena_bytes[t] > 0 ? reserve(ops::Life::kRun, static_cast<ops::Tier>(t), places.arena_bytes[t]) : nullptr;
  made_run_ = 0;
}

void Engine::reserve_step(const ops::Places& largest) {
  for (size_t t = 0; t < largest.arena_bytes.size(); ++t) {
    if (largest.arena_bytes[t] <= step_bytes_[t]) continue;
    step_base_[t] = reserve(ops::Life::kStep, static_cast<ops::Tier>(t), largest.arena_bytes[t]);
    step_bytes_[t] = largest.arena_bytes[t];
  }
}

void Engine::begin_step(const ops::Places& places, BatchData batch, int64_t document_table_bytes) {
  reserve_step(places);
  step_places_ = &places;
  made_step_ = 0;
  alive_ = 0;
  waits_.clear();
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
  if (run || tier != ops::Tier::kDevice) return b;
  const int64_t bytes = round_up(b.bytes(), ops::place_alignment(tier));
  alive_ += bytes;
  peak_alive_ = std::max(peak_alive_, alive_);
  peak_placed_ = std::max(peak_placed_, places.offset_bytes[n] + bytes);
  return b;
}

void Engine::release(const ops::Buffer& b) {
  if (b.tier == ops::Tier::kDevice) alive_ -= round_up(step_places_->bytes[static_cast<size_t>(b.id)], ops::place_alignment(b.tier));
}

int64_t Engine::place_bytes(const ops::Buffer& b) const {
  const ops::Places& places = b.life == ops::Life::kRun ? run_places_ : *step_places_;
  return places.offset_bytes[static_cast<size_t>(b.id)] + b.offset * bytes_of(b.dtype);
}

void* Engine::address(const ops::Buffer& b) const {
  ULY_CHECK(b.tier != ops::Tier::kDisk, "what lies on the disk has no address");
  return (b.life == ops::Life::kRun ? run_base_ : step_base_)[static_cast<size_t>(b.tier)] + place_bytes(b);
}

kernels::Matrix Engine::matrix(const ops::Buffer& b) const {
  if (!b.exists()) return {};
  return {.data = address(b), .dtype = b.dtype, .rows = b.rows, .columns = b.columns, .stride = b.stride};
}

std::array<int64_t, ops::kNumTiers> Engine::held_bytes() const {
  std::array<int64_t, ops::kNumTiers> bytes = step_bytes_;
  for (size_t t = 0; t < bytes.size(); ++t) bytes[t] += run_places_.arena_bytes[t];
  return bytes;
}

std::vector<int64_t> Engine::documents(int64_t S) const {
  const std::vector<int64_t>& starts = batch_.document_starts;
  ULY_CHECK(!starts.empty() && starts.back() == S, "document starts end with the sequence");
  if (!rehearsal_) return starts;
  return {0, std::min(starts[1], kRehearsedDocument)};
}

bool Engine::cut(Map map, const ops::Buffer& matrix, std::initializer_list<ops::Buffer*> operands, ops::Buffer* result) {
  if (!rehearsal_) return true;
  const bool first = rehearsed_.emplace(map, matrix.life, matrix.id, matrix.offset).second;
  for (ops::Buffer* b : operands) *b = b->row_range(0, std::min(b->rows, kRehearsedRows));
  if (result) {
    const ops::Buffer whole = *result;
    *result = whole.row_range(0, first ? std::min(whole.rows, kRehearsedRows) : 0);
    zero_from(whole, result->rows);
  }
  return first;
}

void Engine::zero_from(const ops::Buffer& b, int64_t row) {
  if (row < b.rows) zero(b.row_range(row, b.rows - row));
}

double Engine::scalar(const ops::Buffer& b) {
  ULY_CHECK(b.dtype == Dtype::kF64 && b.elements() == 1 && b.tier == ops::Tier::kDevice, "a scalar is one fp64");
  double value = 0;
  read(&value, b);
  return value;
}

void Engine::mark(std::string_view where, int64_t layer) {
  where_ = where;
  layer_ = layer;
  rehearsed_.clear();
}

std::string Engine::where() const { return layer_ < 0 ? where_ : fmt::format("{}, layer {}", where_, layer_); }

ops::Event Engine::started(std::function<void()> wait) {
  waits_.push_back(std::move(wait));
  return {static_cast<int32_t>(waits_.size()) - 1};
}

void Engine::wait(ops::Event event) {
  if (event.id >= 0) waits_[static_cast<size_t>(event.id)]();
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
