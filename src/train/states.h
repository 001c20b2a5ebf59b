// Saves a run's whole state while it goes on, and goes on from one.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "base/json.h"
#include "train/session.h"

namespace uly::memory {
class HostArena;
}

namespace uly::train {

// How far a run is: what comes next follows from it and the recipe.
struct Progress {
  int64_t steps = 0;     // made, those that were not applied included
  int64_t consumed = 0;  // samples, over all ranks
  int64_t skipped = 0;   // of the steps: not applied, as their gradients were not finite
};

// A save copies this rank's part of the states to host memory, which the step waits for; threads write them and give them their name.
// Where there is no room for a copy it writes at once, and the step waits for that. A save that fails is told and counted; the run goes
// on, and what was saved before stands. All calls but failures() are collective.
class Saver {
 public:
  explicit Saver(Session& session);
  ~Saver();
  Saver(const Saver&) = delete;
  Saver& operator=(const Saver&) = delete;

  // `facts`: what else the manifest is to hold. An earlier save is waited for.
  void save(const recipe::Checkpoint& c, const Progress& progress, const Json& facts);
  // At the end of each step: a save that all ranks have written takes its name.
  void poll();
  // The same, and waits for it.
  void finish();

  int64_t failures() const { return failures_; }
  // Tells and counts what could not be saved, a model too, and removes what there is of it.
  void tell_failure(const std::string& folder, const std::string& why);

 private:
  struct Save;
  void write(Save& save) const;
  void go_on();
  void publish();
  void conclude();
  void failed(const std::string& why);

  Session& s_;
  std::unique_ptr<Save> save_;
  std::unique_ptr<memory::HostArena> copy_;  // stays from save to save: memory that is new costs more than the copy
  int64_t failures_ = 0;
};

// Loads the newest state of `c` that is whole into the session; the manifest. Nothing where there is none. Throws UserError for the state of another model,
// for a recipe that has changed in what the order of data depends on, unless `restart_data`, and where no state is whole. Collective.
struct Resumed {
  Progress progress;
  Json facts;
  std::string folder;
};
std::optional<Resumed> resume(Session& session, const recipe::Checkpoint& c, bool restart_data);

// "epochs: 2 -> 3", for each key in which two recipes differ.
std::vector<std::string> changes_between(const Json& before, const Json& now);

// What the two recipes differ in, as "key: before -> after". Of keys on which model or data order depend, unless `restart_data`: throws UserError.
std::vector<std::string> changes_since(const Json& saved, const Json& now, bool restart_data, const std::string& folder);

}  // namespace uly::train
