#include "models/config.h"

#include <cmath>
#include <utility>

#include "base/check.h"

namespace uly::models {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 31;  // no dimension of a model is larger; products of two stay within int64

void read_heads(const Config& config, const Defaults& defaults, Spec& spec) {
  spec.N = config.count("num_attention_heads", defaults.N);
  // A null is not an absence here: the classes take null as "one for each query head".
  const bool null_heads = config.json().contains("num_key_value_heads") && config.json()["num_key_value_heads"].is_null();
  spec.K = config.count("num_key_value_heads", defaults.K == 0 || null_heads ? spec.N : defaults.K);
  if (spec.N % spec.K != 0) config.refuse("num_key_value_heads", fmt::format("expected a divisor of num_attention_heads {}", spec.N));
  const bool null_size = config.json().contains("head_dim") && config.json()["head_dim"].is_null();
  spec.H = config.count("head_dim", defaults.H == 0 || null_size ? 0 : defaults.H);
  if (spec.H == 0) {
    if (spec.D % spec.N != 0) config.refuse("hidden_size", fmt::format("expected a multiple of num_attention_heads {} where head_dim is absent", spec.N));
    spec.H = spec.D / spec.N;
  }
  ULY_USER_CHECK(spec.H % 2 == 0, "{}: head_dim: expected an even number, found {}", config.where(), spec.H);
  ULY_USER_CHECK(spec.N * spec.H <= kMaxCount, "{}: head_dim: expected at most 2^31 columns in all heads, found {} heads of {}", config.where(), spec.N,
                 spec.H);
}

// The embedding of the padding token gets no gradient, as in torch's Embedding; a negative index counts from the end.
int64_t read_padding_token(const Config& config, int64_t V) {
  const Json* value = config.find("pad_token_id");
  if (value == nullptr) return -1;
  const int64_t token = value->is_number_integer() ? value->get<int64_t>() : V;
  if (token >= V || token < -V) config.refuse("pad_token_id", fmt::format("expected a token below vocab_size {}", V));
  return token < 0 ? token + V : token;
}

}  // namespace

Config::Config(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
  ULY_USER_CHECK(json.is_object(), "{}: expected a JSON object, found {}", where_, json.type_name());
}

const Json* Config::find(const std::string& key) const {
  asked_.insert(key);
  const auto it = json_.find(key);
  return it == json_.end() || it->is_null() ? nullptr : &*it;
}

int64_t Config::count(const std::string& key, int64_t absent) const {
  const Json* value = find(key);
  if (value == nullptr) return absent;
  if (!value->is_number_integer() || value->get<int64_t>() < 1 || value->get<int64_t>() > kMaxCount) refuse(key, "expected a whole number from 1 to 2^31");
  return value->get<int64_t>();
}

double Config::number(const std::string& key, double absent) const {
  const Json* value = find(key);
  if (value == nullptr) return absent;
  if (!value->is_number() || !std::isfinite(value->get<double>())) refuse(key, "expected a number");
  return value->get<double>();
}

bool Config::flag(const std::string& key, bool absent) const {
  const Json* value = find(key);
  if (value == nullptr) return absent;
  if (!value->is_boolean()) refuse(key, "expected true or false");
  return value->get<bool>();
}

std::string Config::text(const std::string& key, const std::string& absent) const {
  const Json* value = find(key);
  if (value == nullptr) return absent;
  if (!value->is_string()) refuse(key, "expected text");
  return value->get<std::string>();
}

void Config::refuse(const std::string& key, const std::string& expected) const {
  const auto it = json_.find(key);
  std::string found = it == json_.end() ? "none" : it->dump(-1, ' ', false, Json::error_handler_t::replace);
  if (found.size() > 80) found = found.substr(0, 77) + "...";
  user_error("{}: {}: {}, found {}", where_, key, expected, found);
}

void read_common(const Config& config, const Defaults& defaults, Spec& spec) {
  spec.D = config.count("hidden_size", defaults.D);
  spec.F = config.count("intermediate_size", defaults.F);
  spec.V = config.count("vocab_size", defaults.V);
  spec.L = config.count("num_hidden_layers", defaults.L);
  if (spec.L > 100'000) config.refuse("num_hidden_layers", "expected at most 100,000");
  spec.max_positions = config.count("max_position_embeddings", defaults.max_positions);
  read_heads(config, defaults, spec);
  spec.norm_eps = config.number("rms_norm_eps", 1e-6);
  if (spec.norm_eps < 0) config.refuse("rms_norm_eps", "expected at least 0");
  spec.initializer_range = config.number("initializer_range", 0.02);
  if (spec.initializer_range < 0) config.refuse("initializer_range", "expected at least 0");
  spec.tied_embeddings = config.flag("tie_word_embeddings", false);
  spec.padding_token = read_padding_token(config, spec.V);
  const std::string activation = config.text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") config.refuse("hidden_act", "expected silu");
  refuse_other_mathematics(config);
  spec.rope = read_rope(config, spec);
}

}  // namespace uly::models
