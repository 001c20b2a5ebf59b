// What `ulysses` can be asked to do: one function a verb; the table is in main.cc. Each returns the exit code or throws.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "launch/nodes.h"

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
  bool measure = false;      // doctor
  std::vector<std::string> disks;  // doctor --measure: folders
  std::string hostfile;
  launch::HostChoice hosts;        // which of its hosts and slots
  bool no_ssh = false;             // the same command is started on each machine
  bool force_multi = false;        // over ssh also where there is one host
  int64_t node_rank = -1;          // this machine's place, with no_ssh
  std::string master_address;      // "": the first host's
  int master_port = 0;             // 0: a free one
  int ssh_port = 0;                // 0: ssh's own choice
  std::string log_folder;          // --enable_each_rank_log
  std::optional<launch::Node> node;  // this machine's part of a job on several
  std::string dump_folder;   // passed on to the engine
  std::string profile_path;  // passed on to the engine
  bool restart_data = false;       // train: go on from a state with the data from its beginning
  int64_t max_restarts = 0;        // train: starts again after exit code 75
  double elapsed_seconds = 0;      // between the job's first start and this process's
  std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();  // this process
  std::string from, to;            // export: the state, the model's folder
};

int train(const Options& options);
int plan(const Options& options);
int rehearse(const Options& options);
int prepare(const Options& options);
int export_state(const Options& options);
int docs(const Options& options);
int doctor(const Options& options);

// Refuses, naming the verb.
[[noreturn]] void not_available(const std::string& verb);

}  // namespace uly::cli
