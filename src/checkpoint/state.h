// A run's whole state on disk, to go on from: master weights and moments in fp32, cut as the ranks hold them, and a manifest.
//
//   output_dir/global_step_120/rank_00000.safetensors   UNIT/master, UNIT/m, UNIT/v of this rank's part of each unit
//                              manifest.json            what the parts are, their digests (XXH3, 64 bits), how far the run was
//   output_dir/latest                                   "global_step_120"
//
// A folder is written as global_step_120.incomplete, flushed, and renamed when all ranks have written; `latest` follows. Whoever reads
// takes ranges of units, so that another number of ranks may go on.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "models/spec.h"

namespace uly::checkpoint {

// Bytes are not what was written, or are missing: an earlier state may be whole.
class DamagedState : public UserError {
 public:
  using UserError::UserError;
};

// A file of a state is not there: lost, or not seen from this machine.
class MissingFile : public DamagedState {
 public:
  explicit MissingFile(const std::string& path) : DamagedState(path + ": is not there"), path_(path) {}
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

enum class Moment { kMaster, kM, kV };
inline constexpr std::array kMoments = {Moment::kMaster, Moment::kM, Moment::kV};

// Elements that are in hand at once, where a state is not held whole.
inline constexpr int64_t kAtOnce = int64_t{1} << 24;

// Elements [begin, begin + count) of a unit's flat buffer.
struct StatePart {
  std::string unit;
  int64_t begin = 0, count = 0;
};

// One rank's file, as a stream.
class StateWriter {
 public:
  // Throws UserError where the folder has no room for it.
  StateWriter(const std::string& incomplete_folder, int64_t rank, const std::vector<StatePart>& parts);

  // For each part in order: master, then m, then v, in pieces of any size.
  void append(const float* values, int64_t count);

  // Flushes to disk. What the manifest holds of this file.
  Json finish();

 private:
  struct Tensor {
    std::string name;
    int64_t begin = 0, count = 0;
    std::string digest;
  };
  std::string name_;
  std::vector<Tensor> tensors_;
  size_t tensor_ = 0;
  int64_t filled_ = 0;
  struct Hash;
  struct Free {
    void operator()(Hash* hash) const;
  };
  std::unique_ptr<Hash, Free> hash_;
  std::unique_ptr<SafetensorsWriter> writer_;
};

// What a manifest says of the model; equal for states that fit each other.
Json identity(const models::Spec& spec, const std::vector<models::Unit>& units);

// Adds the manifest to a folder in which all ranks have written, gives the folder its name and makes it the latest. `facts`: "step",
// "model" (identity), and whatever else; `files`: what each rank's writer returned.
void publish_state(const std::string& incomplete_folder, const std::string& folder, Json facts, const std::vector<Json>& files);

std::string incomplete_name(const std::string& folder);

// Complete states in `output_dir`: the latest first, then by step, the highest first. Nothing where there is no such folder. `more`: others
// to look for there. Throws UserError or DeviceError where the folder cannot be read.
std::vector<std::string> find_states(const std::string& output_dir, const std::vector<std::string>& more = {});

// The run that a state is of, as its manifest says: "" where that is older than such names; nothing where it cannot be read.
std::optional<std::string> run_of(const std::string& folder);

// Renames a state that is damaged, so that it is none: neither used nor counted. Returns its name then; "" where it stays.
std::string set_aside(const std::string& folder);

// Removes the oldest states beyond `keep` (0: keeps all), and what interrupted saves have left. Never the latest.
void prune_states(const std::string& output_dir, int64_t keep);

// Throws UserError if no state may be written there: something is in the way that is none.
void check_state_target(const std::string& folder);

class StateReader {
 public:
  // Reads and checks the manifest. Throws DamagedState; UserError or DeviceError where what is there cannot be read for reasons of another
  // kind: no permission, too many open files, a server that does not answer. So does read().
  explicit StateReader(const std::string& folder);

  const std::string& folder() const { return folder_; }
  const Json& manifest() const { return manifest_; }

  // Throws UserError where the state is another model's: says what differs.
  void check_model(const Json& identity) const;

  // Elements [begin, begin + count) of a unit's flat buffer. The digest of each tensor that is touched is checked first. Throws
  // DamagedState.
  void read(const std::string& unit, Moment moment, int64_t begin, int64_t count, float* out);

 private:
  struct Piece {
    int64_t begin = 0, count = 0;
    std::string file, tensor, digest;
  };
  void compare_model(const Json& identity) const;
  const SafetensorsFile& open(const std::string& file);

  std::string folder_;
  Json manifest_;
  std::map<std::string, std::vector<Piece>> pieces_;  // by "unit/master", by begin
  std::map<std::string, std::unique_ptr<SafetensorsFile>> files_;
  std::set<std::string> whole_;  // file and tensor
};

}  // namespace uly::checkpoint
