#include "train/states.h"

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <limits>
#include <thread>

#include "base/check.h"
#include "base/host_memory.h"
#include "base/log.h"
#include "base/units.h"
#include "checkpoint/hub_files.h"
#include "checkpoint/state.h"
#include "memory/host_arena.h"
#include "train/save.h"

namespace uly::train {
namespace {

namespace fs = std::filesystem;
using checkpoint::kMoments;
using checkpoint::Moment;

constexpr int64_t kLeave = int64_t{2} << 30;  // bytes of a machine's memory that a copy does not take

// This rank's part of each unit.
std::vector<checkpoint::StatePart> parts_of(const Session& s) {
  std::vector<checkpoint::StatePart> parts;
  for (size_t u = 0; u < s.units().size(); ++u) {
    const int64_t n = s.states().units[u].master.columns, begin = std::min(s.mesh().rank * n, s.units()[u].elements);
    parts.push_back({s.units()[u].name, begin, std::min(n, s.units()[u].elements - begin)});
  }
  return parts;
}

// f(unit, moment, at, count): all of a rank's part, in the order of its file.
template <typename F>
void for_pieces(const std::vector<checkpoint::StatePart>& parts, F&& f) {
  for (size_t u = 0; u < parts.size(); ++u)
    for (const Moment moment : kMoments)
      for (int64_t at = 0; at < parts[u].count; at += checkpoint::kAtOnce) f(u, moment, at, std::min(checkpoint::kAtOnce, parts[u].count - at));
}

int64_t elements_of(const std::vector<checkpoint::StatePart>& parts) {
  int64_t n = 0;
  for (const checkpoint::StatePart& p : parts) n += static_cast<int64_t>(kMoments.size()) * p.count;
  return n;
}

void differences(const Json& a, const Json& b, const std::string& path, std::vector<std::array<std::string, 3>>& found) {
  if (a == b) return;
  const auto key = [&](const std::string& name) { return path.empty() ? name : path + "." + name; };
  if (a.is_object() && b.is_object()) {
    for (const auto& [name, value] : a.items()) differences(value, b.contains(name) ? b[name] : Json(), key(name), found);
    for (const auto& [name, value] : b.items())
      if (!a.contains(name)) differences(Json(), value, key(name), found);
    return;
  }
  const auto has_mappings = [](const Json& x) { return x.is_array() && !x.empty() && x[0].is_object(); };
  if (has_mappings(a) && has_mappings(b)) {  // of such a list what is different in it
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) differences(a[i], b[i], key(std::to_string(i)), found);
    if (a.size() != b.size()) found.push_back({path, fmt::format("{} entries", a.size()), fmt::format("{} entries", b.size())});
    return;
  }
  found.push_back({path, a.dump(), b.dump()});
}

// Keys of `data` that say how it is made ready, not what it is, or that have no effect in the recipe.
bool is_data_order(const std::string& key, const Json& recipe) {
  if (key == "data.drop_last" && recipe.value("type", "") != "causal" && recipe.contains("data") && recipe["data"].value("pack_samples", Json()) == Json(false)) return false;
  if (!key.starts_with("data.")) return key == "overfit_first_batch" || key == "min_iterations" || key == "type";
  for (const char* name : {"data.num_proc", "data.cache_dir", "data.cache_fs_type", "data.fail_on_missing_cache", "data.dl_num_workers", "data.eval_", "data.div_length", "data.pad_to"})
    if (key.starts_with(name)) return false;
  return true;
}

bool is_model(const std::string& key) { return key.starts_with("model.hf_config_kwargs") || key == "model.dtype"; }

}  // namespace

// --- saving

struct Saver::Save {
  const recipe::Checkpoint* checkpoint = nullptr;
  std::string folder;
  Json facts;
  std::vector<checkpoint::StatePart> parts;
  const float* copy = nullptr;    // null: states are read as they are written
  std::thread thread;
  std::atomic<bool> done = false;
  Json file;                      // what the writer returned
  std::string error;              // why there is none, or no name
  bool publishing = false;        // all ranks have written; the first gives it its name
};

Saver::Saver(Session& session) : s_(session), copy_(std::make_unique<memory::HostArena>()) {}

Saver::~Saver() {
  if (save_ && save_->thread.joinable()) save_->thread.join();
}

void Saver::write(Save& save) const {
  try {
    std::error_code ignored;
    const std::string folder = checkpoint::incomplete_name(save.folder);
    ULY_USER_CHECK(fs::exists(folder, ignored), "{}: is not seen by rank {}: output_dir has to be on a file system that all machines share", folder, s_.mesh().rank);
    checkpoint::StateWriter writer(folder, s_.mesh().rank, save.parts);
    if (save.copy) {
      writer.append(save.copy, elements_of(save.parts));
    } else {
      std::vector<float> values;
      for_pieces(save.parts, [&](size_t unit, Moment moment, int64_t at, int64_t count) {
        values.resize(static_cast<size_t>(count));
        s_.read_state(unit, moment, at, count, values.data());
        writer.append(values.data(), count);
      });
    }
    save.file = writer.finish();
  } catch (const std::exception& e) {
    save.error = e.what();
  }
  save.done = true;
}

void Saver::save(const recipe::Checkpoint& c, const Progress& progress, const Json& facts) {
  finish();
  s_.flush();
  save_ = std::make_unique<Save>();
  Save& save = *save_;
  save.checkpoint = &c;
  save.folder = save_folder(c, progress.steps);
  save.facts = {{"step", progress.steps}, {"consumed", progress.consumed}, {"skipped", progress.skipped}, {"world", s_.mesh().W}, {"plan", s_.plan().hash}, {"recipe", s_.recipe().normalized}, {"model", checkpoint::identity(s_.spec(), s_.units())}};
  save.facts.update(facts);
  save.parts = parts_of(s_);
  try {
    on_first(s_.world(), [&] {
      checkpoint::check_state_target(save.folder);
      checkpoint::remove_folder(checkpoint::incomplete_name(save.folder));
      std::error_code ignored;
      if (!fs::exists(c.output_dir, ignored)) say("{} is gone: made anew", c.output_dir);
      checkpoint::make_folder(checkpoint::incomplete_name(save.folder));
    });
  } catch (const UserError& e) {
    return failed(e.what());
  }
  const int64_t ranks = std::max<int64_t>(1, s_.machine().local_ranks), bytes = elements_of(save.parts) * static_cast<int64_t>(sizeof(float));
  const int64_t room = host_memory().obtainable_bytes / ranks - kLeave;
  const int cores = static_cast<int>(std::max<int64_t>(1, s_.machine().cores / ranks));
  bool has_room = bytes <= copy_->bytes() || bytes <= room;
  try {
    if (has_room && copy_->bytes() < bytes) *copy_ = memory::HostArena(bytes, cores);
  } catch (const UserError&) {
    has_room = false;
  }
  if (s_.world().all().max(has_room ? 0 : 1) > 0) {
    *copy_ = {};
    write(save);
    return finish();
  }
  float* next = reinterpret_cast<float*>(copy_->base());
  save.copy = next;
  for_pieces(save.parts, [&](size_t unit, Moment moment, int64_t at, int64_t count) {
    s_.read_state(unit, moment, at, count, next);
    next += count;
  });
  save.thread = std::thread([this, &save] { write(save); });
}

void Saver::poll() {
  if (save_ && s_.world().all().max(save_->done ? 0 : 1) == 0) go_on();
}

void Saver::finish() {
  while (save_) go_on();
}

void Saver::go_on() {
  if (save_->thread.joinable()) save_->thread.join();
  save_->publishing ? conclude() : publish();
}

// All ranks have written, or tried to. The first gives the state its name: in a thread too, for disks take their time.
void Saver::publish() {
  Save& save = *save_;
  const std::vector<std::string> all = s_.world().all().exchange(Json{{"file", save.file}, {"error", save.error}}.dump());
  std::vector<Json> files;
  std::string error;
  for (const std::string& one : all) {
    const Json rank = Json::parse(one);
    if (error.empty()) error = rank.at("error");
    files.push_back(rank.at("file"));
  }
  if (!error.empty()) return failed(error);
  save.publishing = true;
  if (!s_.first()) return;
  save.done = false;
  save.thread = std::thread([this, &save, files = std::move(files)] {
    try {
      for (size_t rank = 0; rank < files.size(); ++rank) {
        std::error_code ignored;
        const fs::path path = fs::path(checkpoint::incomplete_name(save.folder)) / files[rank].at("file").get<std::string>();
        ULY_USER_CHECK(fs::exists(path, ignored), "{}: rank {} has written it, but it is not here: output_dir has to be on a file system that all machines share", path.string(), rank);
      }
      checkpoint::publish_state(checkpoint::incomplete_name(save.folder), save.folder, save.facts, files);
      checkpoint::prune_states(save.checkpoint->output_dir, save.checkpoint->save_total_limit);
    } catch (const std::exception& e) {
      save.error = e.what();
    }
    save.done = true;
  });
}

void Saver::conclude() {
  const std::string error = s_.world().all().exchange(save_->error)[0];
  if (!error.empty()) return failed(error);
  if (s_.first()) say("saved {}", save_->folder);
  save_.reset();
}

void Saver::failed(const std::string& why) {
  tell_failure(save_->folder, why);
  save_.reset();
}

void Saver::tell_failure(const std::string& folder, const std::string& why) {
  ++failures_;
  if (!s_.first()) return;
  say("SAVING {} FAILED: {}; training goes on, and what was saved before stands", folder, why);
  try {
    checkpoint::remove_folder(checkpoint::incomplete_name(folder));
  } catch (const UserError&) {
    // its disk may be what failed
  }
}

// --- going on

std::vector<std::string> changes_between(const Json& before, const Json& now) {
  std::vector<std::array<std::string, 3>> found;
  differences(before, now, "", found);
  std::vector<std::string> words;
  for (const auto& [key, a, b] : found) words.push_back(fmt::format("{}: {} -> {}", key, a, b));
  return words;
}

std::vector<std::string> changes_since(const Json& saved, const Json& now, bool restart_data, const std::string& folder) {
  std::vector<std::array<std::string, 3>> found;
  differences(saved, now, "", found);
  std::vector<std::string> changes;
  for (const auto& [key, before, after] : found) {
    ULY_USER_CHECK(!is_model(key), "{}: {} was {} when it was saved, the recipe says {}: expected the same; begin a new run in another output_dir", folder, key, before, after);
    ULY_USER_CHECK(restart_data || !is_data_order(key, now), "{}: {} was {} when it was saved, the recipe says {}: which samples have been seen is not known then; expected the same, or --restart-data to begin the data anew", folder, key, before, after);
    changes.push_back(fmt::format("{}: {} -> {}", key, before, after));
  }
  return changes;
}

// The states that there are to go on from, as the first rank sees them. Throws UserError where it does not see what another machine does.
std::vector<std::string> states_to_resume(Session& s, const std::string& output_dir) {
  const auto found_here = [&](const std::vector<std::string>& more) {
    Json found = {{"folders", Json::array()}, {"error", ""}};
    try {
      found["folders"] = checkpoint::find_states(output_dir, more);
    } catch (const UserError& e) {
      found["error"] = e.what();
    }
    return found.dump();
  };
  std::vector<std::string> of_others;
  const std::vector<std::string> found = s.machines().ask([&] { return found_here({}); });
  for (const std::string& one : found) {
    const Json there = one.empty() ? Json::object() : Json::parse(one);
    for (const std::string& folder : there.value("folders", std::vector<std::string>())) of_others.push_back(folder);
  }
  const Json first = Json::parse(s.world().all().exchange(s.first() ? found_here(of_others) : "")[0]);
  if (const std::string error = first.at("error"); !error.empty()) throw UserError(error);
  const auto folders = first.at("folders").get<std::vector<std::string>>();
  for (const std::string& folder : of_others)
    ULY_USER_CHECK(std::find(folders.begin(), folders.end(), folder) != folders.end(), "output_dir has to be on a file system that all machines share: {} does not see {}", s.machines().name(0), folder);
  return folders;
}

// Throws UserError where a file that some rank misses is there on another's machine. `missing`: what this rank misses. Collective.
void check_missing_everywhere(Session& s, const std::string& missing) {
  std::string path;
  for (const std::string& one : s.world().all().exchange(missing))
    if (path.empty()) path = one;
  if (path.empty()) return;
  std::error_code ignored;
  const std::vector<std::string> seen = s.world().all().exchange(fs::exists(path, ignored) ? "1" : "0");
  const auto blind = std::find(seen.begin(), seen.end(), "0");
  if (blind == seen.end() || std::find(seen.begin(), seen.end(), "1") == seen.end()) return;
  user_error("output_dir has to be on a file system that all machines share: {} does not see {}", s.machines().words(static_cast<size_t>(blind - seen.begin())), path);
}

std::optional<Resumed> resume(Session& s, const recipe::Checkpoint& c, bool restart_data) {
  comm::Group& all = s.world().all();
  const std::vector<std::string> folders = states_to_resume(s, c.output_dir);
  const std::vector<checkpoint::StatePart> parts = parts_of(s);
  std::vector<std::string> not_whole;
  for (const std::string& folder : folders) {
    std::string damaged, missing, refused;
    Json manifest;
    try {
      checkpoint::StateReader reader(folder);
      manifest = reader.manifest();
      reader.check_model(checkpoint::identity(s.spec(), s.units()));
      const auto changes = changes_since(manifest.at("recipe"), s.recipe().normalized, restart_data, folder);
      if (s.first())
        for (const std::string& change : changes) say("changed since {}: {}", fs::path(folder).filename().string(), change);
      std::vector<float> values;
      for_pieces(parts, [&](size_t unit, Moment moment, int64_t at, int64_t count) {
        values.resize(static_cast<size_t>(count));
        reader.read(parts[unit].unit, moment, parts[unit].begin + at, count, values.data());
        s.write_state(unit, moment, at, values);
      });
    } catch (const checkpoint::MissingFile& e) {
      damaged = e.what();
      missing = e.path();
    } catch (const checkpoint::DamagedState& e) {
      damaged = e.what();
    } catch (const Json::exception&) {
      damaged = folder + ": its manifest is not complete";
    } catch (const UserError& e) {
      refused = e.what();
    }
    for (const std::string& why : all.exchange(refused))
      if (!why.empty()) throw UserError(why);
    check_missing_everywhere(s, missing);
    std::string first;
    for (const std::string& why : all.exchange(damaged))
      if (first.empty()) first = why;
    if (first.empty()) {
      if (s.first())
        for (const std::string& other : not_whole)
          if (const std::string aside = checkpoint::set_aside(other); !aside.empty()) say("{} is {} now: remove it when nobody needs it", other, fs::path(aside).filename().string());
      Progress progress{.steps = manifest.at("step"), .consumed = restart_data ? 0 : manifest.at("consumed").get<int64_t>(), .skipped = manifest.value("skipped", int64_t{0})};
      return Resumed{progress, std::move(manifest), folder};
    }
    if (s.first()) say("DAMAGED: {}: not used", first);
    not_whole.push_back(folder);
  }
  ULY_USER_CHECK(folders.empty(), "{}: none of the {} states there is whole: move them away to begin anew", c.output_dir, folders.size());
  return std::nullopt;
}

}  // namespace uly::train
