// Rotary embeddings, from the configuration to inverse frequencies. The arithmetic follows Transformers' in fp32, operation
// by operation (a number over a tensor is its reciprocal times the number), so that the table agrees to the last bit or so.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>
#include <set>

#include "base/check.h"
#include "models/config.h"

namespace uly::models {
namespace {

struct Row {
  const char* name;
  Rope::Type type;
};
constexpr Row kTypes[] = {{"default", Rope::Type::kDefault},
                          {"linear", Rope::Type::kLinear},
                          {"llama3", Rope::Type::kLlama3},
                          {"yarn", Rope::Type::kYarn},
                          {"dynamic", Rope::Type::kDynamic}};

const std::set<std::string> kKeys = {"rope_type",
                                     "type",
                                     "rope_theta",
                                     "factor",
                                     "original_max_position_embeddings",
                                     "low_freq_factor",
                                     "high_freq_factor",
                                     "beta_fast",
                                     "beta_slow",
                                     "attention_factor",
                                     "mscale",
                                     "mscale_all_dim",
                                     "truncate",
                                     "partial_rotary_factor"};

Rope::Type read_type(const Config& rope) {
  const std::string name = rope.text("rope_type", rope.text("type", "default"));
  if (rope.text("type", name) != name) rope.refuse("type", "expected the same as rope_type");
  std::string list;
  for (const Row& row : kTypes) {
    if (name == row.name) return row.type;
    list += (list.empty() ? "" : ", ") + std::string(row.name);
  }
  rope.refuse(rope.find("rope_type") ? "rope_type" : "type", "not supported: expected one of " + list);
}

double positive(const Config& rope, const std::string& key, std::optional<double> absent) {
  if (!absent && !rope.find(key)) rope.refuse(key, "expected a number above 0");
  const double value = rope.number(key, absent.value_or(0));
  if (rope.find(key) && value <= 0) rope.refuse(key, "expected a number above 0");
  return value;
}

// Reads one mapping, rope_scaling or rope_parameters.
Rope read_mapping(const Config& config, const std::string& key, const Json& mapping, const Spec& spec, double theta) {
  if (!mapping.is_object()) config.refuse(key, "expected a mapping");
  const Config rope(mapping, config.where() + ": " + key);
  Rope r;
  r.type = read_type(rope);
  for (const auto& [name, value] : mapping.items())
    if (!kKeys.contains(name) && !value.is_null()) rope.refuse(name, "not supported: expected none");
  if (rope.number("partial_rotary_factor", 1) != 1) rope.refuse("partial_rotary_factor", "not supported: expected 1");
  r.theta = positive(rope, "rope_theta", theta);
  if (r.type == Rope::Type::kDefault) return r;
  // A length beside the mapping goes before one within, as some models keep it there.
  r.original_max_positions = config.count("original_max_position_embeddings", rope.count("original_max_position_embeddings", spec.max_positions));
  const bool by_length = r.type == Rope::Type::kYarn && mapping.contains("factor");  // null: the ratio of the lengths
  r.factor = positive(rope, "factor",
                      by_length ? std::optional(static_cast<double>(spec.max_positions) / static_cast<double>(r.original_max_positions)) : std::nullopt);
  if (r.type == Rope::Type::kLlama3) {
    r.low_freq_factor = positive(rope, "low_freq_factor", std::nullopt);
    r.high_freq_factor = positive(rope, "high_freq_factor", std::nullopt);
    if (r.high_freq_factor <= r.low_freq_factor) rope.refuse("high_freq_factor", fmt::format("expected more than low_freq_factor {}", r.low_freq_factor));
  }
  if (r.type == Rope::Type::kYarn) {
    r.attention_factor = positive(rope, "attention_factor", 0);
    r.mscale = rope.number("mscale", 0);
    r.mscale_all_dim = rope.number("mscale_all_dim", 0);
    const double fast = rope.number("beta_fast", 32), slow = rope.number("beta_slow", 1);
    r.beta_fast = fast == 0 ? 32 : fast;
    r.beta_slow = slow == 0 ? 1 : slow;
    if (r.beta_slow <= 0 || r.beta_fast < r.beta_slow) rope.refuse("beta_fast", fmt::format("expected at least beta_slow, which is {}", r.beta_slow));
    r.truncate = rope.flag("truncate", !mapping.contains("truncate"));
    if (r.theta == 1) rope.refuse("rope_theta", "expected other than 1 with yarn");
  }
  if (r.type == Rope::Type::kDynamic && spec.H <= 2) rope.refuse("rope_type", "expected head_dim above 2 with dynamic");
  return r;
}

float power(float base, double exponent) { return static_cast<float>(std::pow(static_cast<double>(base), exponent)); }

// Returns theta^(2i / H) for i < H/2.
std::vector<float> wavelengths(float theta, int64_t H) {
  std::vector<float> out;
  for (int64_t i = 0; i < H; i += 2) out.push_back(power(theta, static_cast<float>(i) / static_cast<float>(H)));
  return out;
}

std::vector<float> reciprocals(std::vector<float> x) {
  for (float& v : x) v = 1.0f / v;
  return x;
}

// Up to max_positions the base is stretched in double, by one; beyond, in fp32, as the length is a tensor there (its
// power is taken in double all the same).
float dynamic_theta(const Rope& rope, int64_t H, int64_t max_positions, int64_t length) {
  const double exponent = static_cast<double>(H) / static_cast<double>(H - 2), limit = static_cast<double>(max_positions);
  if (length <= max_positions) return static_cast<float>(rope.theta * std::pow(rope.factor * limit / limit - (rope.factor - 1), exponent));
  const float ratio = static_cast<float>(rope.factor) * static_cast<float>(length) / static_cast<float>(max_positions);
  return static_cast<float>(rope.theta) * power(ratio - static_cast<float>(rope.factor - 1), exponent);
}

// Short waves stay, long ones are divided by the factor, those between are mixed.
void stretch_llama3(const Rope& rope, std::vector<float>& frequencies) {
  const float factor = static_cast<float>(rope.factor), low = static_cast<float>(rope.low_freq_factor);
  const double length = static_cast<double>(rope.original_max_positions);
  const float longest = static_cast<float>(length / rope.low_freq_factor), shortest = static_cast<float>(length / rope.high_freq_factor);
  for (float& f : frequencies) {
    const float wave = (1.0f / f) * static_cast<float>(2 * std::numbers::pi);
    if (wave > longest) {
      f = f / factor;
    } else if (!(wave < shortest)) {
      const float smooth = ((1.0f / wave) * static_cast<float>(length) - low) / static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
      f = (1.0f - smooth) * f / factor + smooth * f;
    }
  }
}

double magnitude(double factor, double mscale) { return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0; }

RopeTable yarn(const Rope& rope, int64_t H) {
  RopeTable table;
  const bool scaled = rope.mscale != 0 && rope.mscale_all_dim != 0;
  table.attention_factor = static_cast<float>(rope.attention_factor != 0 ? rope.attention_factor
                                              : scaled                   ? magnitude(rope.factor, rope.mscale) / magnitude(rope.factor, rope.mscale_all_dim)
                                                                         : magnitude(rope.factor, 1));
  const auto column_of = [&](double rotations) {
    return static_cast<double>(H) * std::log(static_cast<double>(rope.original_max_positions) / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(rope.theta));
  };
  double low = column_of(rope.beta_fast), high = column_of(rope.beta_slow);
  if (rope.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0), high = std::min(high, static_cast<double>(H - 1));
  if (low == high) high += 0.001;
  const std::vector<float> waves = wavelengths(static_cast<float>(rope.theta), H);
  for (size_t i = 0; i < waves.size(); ++i) {
    const float ramp = (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low);
    const float kept = 1.0f - std::clamp(ramp, 0.0f, 1.0f);
    const float stretched = 1.0f / (static_cast<float>(rope.factor) * waves[i]);
    table.inverse_frequencies.push_back(stretched * (1.0f - kept) + (1.0f / waves[i]) * kept);
  }
  return table;
}

}  // namespace

Rope read_rope(const Config& config, const Spec& spec) {
  const double theta = positive(config, "rope_theta", 10000);
  std::optional<Rope> rope;
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* mapping = config.find(key);
    if (mapping == nullptr || mapping->empty()) continue;
    const Rope next = read_mapping(config, key, *mapping, spec, theta);
    if (rope && *rope != next) config.refuse(key, "expected the same as rope_scaling says");
    rope = next;
  }
  return rope.value_or(Rope{.theta = theta});
}

RopeTable rope_table(const Spec& spec, int64_t length) {
  const Rope& rope = spec.rope;
  if (rope.type == Rope::Type::kYarn) return yarn(rope, spec.H);
  const float theta = rope.type == Rope::Type::kDynamic ? dynamic_theta(rope, spec.H, spec.max_positions, length) : static_cast<float>(rope.theta);
  RopeTable table{.inverse_frequencies = reciprocals(wavelengths(theta, spec.H))};
  if (rope.type == Rope::Type::kLinear)
    for (float& f : table.inverse_frequencies) f /= static_cast<float>(rope.factor);
  if (rope.type == Rope::Type::kLlama3) stretch_llama3(rope, table.inverse_frequencies);
  return table;
}

}  // namespace uly::models
