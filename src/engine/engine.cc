#include "engine/engine.h"

#include <ATen/ops/from_blob.h>

#include <cstring>

#include "base/check.h"
#include "base/shapes.h"

namespace uly::engine {
namespace {

at::ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64: return at::kDouble;
    case Dtype::kF32: return at::kFloat;
    case Dtype::kBf16: return at::kBFloat16;
    case Dtype::kF16: return at::kHalf;
    case Dtype::kI64: return at::kLong;
    case Dtype::kI32: return at::kInt;
    case Dtype::kU8: return at::kByte;
  }
  ULY_CHECK(false, "a dtype without a tensor type");
}

}  // namespace

void Engine::begin_run(const ops::Places& places) {
  run_places_ = places;
  run_arena_ = memory::Arena(places.arena_bytes);
  made_run_ = 0;
}

void Engine::reserve_step(int64_t bytes) {
  if (bytes <= step_arena_.bytes()) return;
  step_arena_ = memory::Arena();
  step_arena_ = memory::Arena(bytes);
}

void Engine::begin_step(const ops::Places& places, const BatchData& batch) {
  reserve_step(places.arena_bytes);
  step_places_ = &places;
  made_step_ = 0;
  alive_ = 0;
  works_.clear();
  batch_ = batch;
  const std::vector<int64_t>* given[] = {&batch_.ids, &batch_.labels, &batch_.positions};
  for (int i = 0; i < 3; ++i) {
    inputs_[i] = make(static_cast<int64_t>(given[i]->size()), 1, Dtype::kI64, ops::Kind::kInputs, "token ids, labels, positions", ops::Life::kStep, ops::Tier::kDevice);
    std::memcpy(address(inputs_[i]), given[i]->data(), given[i]->size() * sizeof(int64_t));
  }
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

ops::Buffer Engine::input(ops::Input which) { return inputs_[static_cast<size_t>(which)]; }

void* Engine::address(const ops::Buffer& b) const {
  const bool run = b.life == ops::Life::kRun;
  const ops::Places& places = run ? run_places_ : *step_places_;
  return (run ? run_arena_ : step_arena_).base() + places.offset_bytes[static_cast<size_t>(b.id)] + b.offset * bytes_of(b.dtype);
}

at::Tensor Engine::tensor(const ops::Buffer& b) const {
  return at::from_blob(address(b), {b.rows, b.columns}, {b.stride, 1}, at::TensorOptions(scalar_type(b.dtype)));
}

kernels::Matrix Engine::matrix(const ops::Buffer& b) const { return {.data = address(b), .dtype = b.dtype, .rows = b.rows, .columns = b.columns, .stride = b.stride}; }

double Engine::scalar(const ops::Buffer& b) const {
  ULY_CHECK(b.dtype == Dtype::kF64 && b.elements() == 1, "a scalar is one fp64");
  return *static_cast<const double*>(address(b));
}

void Engine::mark(std::string_view where, int64_t layer) {
  where_ = where;
  layer_ = layer;
}

std::string Engine::where() const { return layer_ < 0 ? where_ : fmt::format("{}, layer {}", where_, layer_); }

}  // namespace uly::engine
