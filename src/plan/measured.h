// Rates that `ulysses doctor --measure` has found on a machine, and the file that keeps them.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "base/json.h"
#include "plan/rates.h"

namespace uly::plan {

// Of one device with all of the host's cores; ranks share them.
struct Measured {
  std::string processor;  // "AMD EPYC 9R14", "NVIDIA H200"
  int64_t cores = 0;      // of the host
  std::string date;       // 2026-11-25
  Rates fp32, bf16;       // by the dtype of weights and activations; a GPU has bf16 alone
  std::map<std::string, double> disks;  // bytes a second, by folder
};

// {"version": 1, "cpu": {...}, "cuda": {...}}
struct RatesFile {
  std::optional<Measured> cpu, cuda;
};

Json to_json(const Rates& rates);
Json to_json(const Measured& measured);
std::string text_of(const RatesFile& file);

// What only the engine knows: fp32, bf16 and disks. Throws nlohmann's exceptions.
Measured measured_from(const Json& json);

// Throws UserError naming `path` for what is no such file.
RatesFile rates_file_from(const std::string& text, const std::string& path);

// No file: nothing.
std::optional<std::string> read_rates_file(const std::string& path);

}  // namespace uly::plan
