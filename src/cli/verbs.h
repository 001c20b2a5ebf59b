// What `ulysses` can be asked to do: one function a verb; the table is in main.cc. Each returns the exit code or throws.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace uly::cli {

inline constexpr const char* kVersion = "0.1.0";

// A machine that one does not have, for `plan`.
struct WhatIf {
  bool given = false;      // --gpus
  int64_t nodes = 1;
  std::string gpu, gpu_memory, host_memory, disk;
  int64_t host_cores = 0;
  // Whether a machine is to be imagined; room on a disk is imagined beside any.
  bool any() const { return given || nodes != 1 || !gpu.empty() || !gpu_memory.empty() || !host_memory.empty() || host_cores > 0; }
};

// The command line after the verb.
struct Options {
  std::string recipe;
  std::vector<std::string> overrides;  // key.path=value
  std::optional<std::string> device;   // cpu | cuda
  std::optional<int64_t> num_ranks;    // --num_gpus: ranks on this machine
  bool json = false;
  WhatIf what_if;
  bool explain = false;      // plan: what else was considered
  std::vector<std::string> compare;  // plan: KEY=V1,V2,...
  int64_t show = 0;          // prepare: how many samples to print
  int master_port = 0;       // 0: a free one
  std::string dump_folder;   // passed on to the engine
  std::string profile_path;  // passed on to the engine
};

int train(const Options& options);
int plan(const Options& options);
int rehearse(const Options& options);
int prepare(const Options& options);
int docs(const Options& options);
int doctor(const Options& options);

// Refuses, naming the verb.
[[noreturn]] void not_available(const std::string& verb);

}  // namespace uly::cli
