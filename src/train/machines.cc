#include "train/machines.h"

#include <algorithm>
#include <filesystem>

#include "base/check.h"
#include "launch/environment.h"

namespace uly::train {

Machines::Machines(comm::World& world) : world_(world) {
  const auto place = launch::place_in_job();
  const bool first_here = !place || place->local_rank == 0;
  if (world.size() == 1) return;
  std::vector<bool> first;
  for (const std::string& one : world.all().exchange((first_here ? "1" : "0") + comm::machine_name())) {
    const bool known = std::find(names_.begin(), names_.end(), one.substr(1)) != names_.end();
    first.push_back(one[0] == '1' || !known);
    names_.push_back(one.substr(1));
  }
  speaks_ = first[static_cast<size_t>(world.rank())];
  several_ = std::count(first.begin(), first.end(), true) > 1;
}

int64_t Machines::first_other(const std::vector<std::string>& answers) {
  const auto other = std::find_if(answers.begin(), answers.end(), [&](const std::string& a) { return !a.empty() && a != answers[0]; });
  return other == answers.end() ? -1 : other - answers.begin();
}

void compare_data(Machines& machines, const plan::Plan& plan) {
  const auto compare = [&](const plan::Packed& data, const char* what) {
    if (!data || !machines.several()) return;
    const auto same = [&](auto&& mine) {
      const int64_t other = Machines::first_other(machines.ask(mine));
      ULY_USER_CHECK(other < 0, "{}: its data to {} on are not those of {}: expected the same files of data, tokenizer and chat template on all machines", machines.words(static_cast<size_t>(other)), what, machines.words(0));
    };
    same([&] { return data.file->fingerprint(); });
    // A file's name is a hash of what it was made of.
    if (Machines::first_other(machines.ask([&] { return std::filesystem::path(data.file->path()).filename().string(); })) >= 0) same([&] { return data.file->digest(); });
  };
  compare(plan.train, "train");
  if (plan.eval.file != plan.train.file) compare(plan.eval, "evaluate");
}

}  // namespace uly::train
