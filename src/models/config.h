// Reads config.json: typed look-ups whose errors name the file, the key, what was expected and what was found.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "base/json.h"
#include "models/spec.h"

namespace uly::models {

class Config {
 public:
  // `json` must outlive the Config.
  Config(const Json& json, std::string where);

  const std::string& where() const { return where_; }
  const Json& json() const { return json_; }
  const std::set<std::string>& asked() const { return asked_; }  // every key that was looked up

  // Returns the value of `key`, nullptr where it is absent or null.
  const Json* find(const std::string& key) const;

  // Return the value of `key`, or `absent` where it is absent or null.
  int64_t count(const std::string& key, int64_t absent) const;  // a whole number of at least 1
  double number(const std::string& key, double absent) const;
  bool flag(const std::string& key, bool absent) const;
  std::string text(const std::string& key, const std::string& absent) const;

  [[noreturn]] void refuse(const std::string& key, const std::string& expected) const;  // "..., found <its value>"

 private:
  const Json& json_;
  std::string where_;
  mutable std::set<std::string> asked_;
};

// What a family's configuration class takes for keys that are absent. K 0: as N. H 0: D / N.
struct Defaults {
  int64_t D = 0, F = 0, N = 0, K = 0, H = 0, V = 0, L = 0, max_positions = 0;
};

// Reads what all families have in common into `spec`: dimensions, norm, rope, tied embeddings; refuses every setting
// that would change the mathematics.
void read_common(const Config& config, const Defaults& defaults, Spec& spec);

// Reads rope_theta, rope_scaling and rope_parameters; H and max_positions must be known.
Rope read_rope(const Config& config, const Spec& spec);

// Refuses every key that would change the mathematics unless it has the value that does not (refused.cc).
void refuse_other_mathematics(const Config& config);

// Reads a whole Spec; `config.asked()` holds the keys that matter afterwards.
Spec read_spec(const Config& config);

}  // namespace uly::models
