// One rank's part of a training run, from the recipe to the saved checkpoint.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace uly::comm {
class World;
}

namespace uly::train {

struct Job {
  std::string recipe_path;
  std::vector<std::string> overrides;
  std::string model_folder;   // where config.json and the weights lie
  std::string tokenizer_folder;  // what is saved beside the weights; empty: the model's
  std::string tokens_path;    // what `prepare` has written; empty where it rehearses
  std::string eval_tokens_path;  // the same of data.eval_sources; empty without
  std::string dump_folder;    // if not empty: step_N.safetensors there holds the loss and every gradient of step N
  std::string rates_path;     // what was measured on rank 0's machine; empty: nothing
  bool cuda = false;
  uint64_t delays = 0;        // for tests: engine::CpuOptions::delays
  std::string disk_faults;    // for tests: memory::faults_from
  bool rehearse = false;      // one step without data, weights and arithmetic: train/rehearse.h
  bool json = false;          // what a rehearsal says is for programs
  double began = 0;           // when the job was started for the first time, in seconds of this machine's steady clock: counts for exit_after; 0: now
  bool restart_data = false;  // go on from a state with the data from its beginning
  std::string profile;        // if not empty: where rank 0 writes a Chrome trace of the third step, or of the last before
};

// Joins the ranks named by the environment, trains, saves. Returns the process's exit code; throws Error.
int run(const Job& job);

// The same, as one rank of a world that has been joined.
int run(const Job& job, comm::World& world);

// Joins the ranks named by the environment only to tell them that this one was asked to stop: all that have come end. Throws as joining does.
void leave();

}  // namespace uly::train
