#include "checkpoint/init.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "base/check.h"

namespace uly::checkpoint {
namespace {

using Words = std::array<uint32_t, 4>;

Words philox(Words counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(b), static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1,
               static_cast<uint32_t>(a)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// Returns the four normal numbers of elements [4 * quad, 4 * quad + 4) of a unit, by Box and Muller's formula.
std::array<float, 4> normals(uint64_t quad, uint32_t unit_index, uint64_t seed) {
  const Words w = philox({static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32), unit_index, 0}, seed);
  std::array<float, 4> out;
  for (size_t i = 0; i < 4; i += 2) {
    const float u = (static_cast<float>(w[i]) + 1.0f) * 0x1p-32f;  // above zero: its logarithm is finite
    const float angle = static_cast<float>(w[i + 1]) * 0x1p-32f * 2.0f * std::numbers::pi_v<float>;
    const float radius = std::sqrt(std::max(0.0f, -2.0f * std::log(u)));
    out[i] = radius * std::cos(angle);
    out[i + 1] = radius * std::sin(angle);
  }
  return out;
}

void fill_normal(uint64_t seed, uint32_t unit_index, int64_t first, int64_t last, float deviation, float* out) {
  for (int64_t quad = first / 4; quad * 4 < last; ++quad) {
    const std::array<float, 4> values = normals(static_cast<uint64_t>(quad), unit_index, seed);
    for (int64_t i = std::max(first, quad * 4); i < std::min(last, quad * 4 + 4); ++i) out[i - first] = deviation * values[static_cast<size_t>(i - quad * 4)];
  }
}

}  // namespace

void fill_initial(const models::Spec& spec, const models::Unit& unit, uint64_t seed, int64_t unit_index, int64_t first_element, int64_t count, float* out) {
  ULY_CHECK(first_element >= 0 && count >= 0 && first_element + count <= unit.elements, "elements of " + unit.name);
  std::fill_n(out, count, 0.0f);
  for (const models::Tensor& tensor : unit.tensors) {
    const auto within = [&](int64_t begin, int64_t end) { return std::pair(std::max(begin, first_element), std::min(end, first_element + count)); };
    const auto [begin, end] = within(tensor.offset, tensor.offset + tensor.elements());
    if (begin >= end || tensor.is_bias) continue;
    if (tensor.is_norm)
      std::fill_n(out + (begin - first_element), end - begin, 1.0f);
    else
      fill_normal(seed, static_cast<uint32_t>(unit_index), begin, end, static_cast<float>(spec.initializer_range), out + (begin - first_element));
    if (spec.padding_token >= 0 && tensor.name == "model.embed_tokens.weight") {
      const auto [row, row_end] = within(tensor.offset + spec.padding_token * spec.D, tensor.offset + (spec.padding_token + 1) * spec.D);
      if (row < row_end) std::fill_n(out + (row - first_element), row_end - row, 0.0f);
    }
  }
}

}  // namespace uly::checkpoint
