#include "engine/cpu/cpu_engine.h"

#include <ATen/ops/from_blob.h>

#include <cstring>

#include "base/check.h"

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
    case Dtype::kI16: return at::kShort;
    case Dtype::kU8: return at::kByte;
  }
  ULY_CHECK(false, "a dtype without a tensor type");
}

}  // namespace

std::byte* CpuEngine::reserve(ops::Life life, int64_t bytes) {
  memory::Arena& arena = life == ops::Life::kRun ? run_arena_ : step_arena_;
  arena = memory::Arena();
  arena = memory::Arena(bytes);
  return arena.base();
}

void CpuEngine::load_batch(const ops::Buffer&) {
  write(input(ops::Input::kIds_s), batch().ids.data());
  write(input(ops::Input::kLabels_s), batch().labels.data());
  write(input(ops::Input::kPositions_s), batch().positions.data());
}

void CpuEngine::read(void* host, const ops::Buffer& b) { std::memcpy(host, address(b), static_cast<size_t>(b.bytes())); }
void CpuEngine::write(const ops::Buffer& b, const void* host) { std::memcpy(address(b), host, static_cast<size_t>(b.bytes())); }

at::Tensor CpuEngine::tensor(const ops::Buffer& b) const {
  return at::from_blob(address(b), {b.rows, b.columns}, {b.stride, 1}, at::TensorOptions(scalar_type(b.dtype)));
}

}  // namespace uly::engine
