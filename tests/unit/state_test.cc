// A whole state: written by some ranks, read by others; what is damaged is known.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "base/check.h"
#include "base/shapes.h"
#include "checkpoint/hub_files.h"
#include "checkpoint/state.h"

namespace uly::checkpoint {
namespace {

namespace fs = std::filesystem;

class State : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / fmt::format("state-test-{}", ::getpid());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  // Elements of a unit, and what each of its moments holds at i.
  static constexpr int64_t kElements[] = {100, 64, 7};
  static float value(size_t unit, Moment moment, int64_t i, int64_t step) { return static_cast<float>(unit * 1000 + static_cast<size_t>(moment) * 300 + static_cast<size_t>(i)) + static_cast<float>(step) / 16; }
  static std::string name(size_t unit) { return fmt::format("unit{}", unit); }

  std::string save(int64_t step, int64_t world) {
    const std::string folder = (folder_ / fmt::format("global_step_{}", step)).string(), incomplete = incomplete_name(folder);
    make_folder(incomplete);
    std::vector<Json> files;
    for (int64_t rank = 0; rank < world; ++rank) {
      std::vector<StatePart> parts;
      for (size_t u = 0; u < 3; ++u) {
        const int64_t n = ceil_div(kElements[u], world), begin = std::min(rank * n, kElements[u]);
        parts.push_back({name(u), begin, std::min(n, kElements[u] - begin)});
      }
      StateWriter writer(incomplete, rank, parts);
      for (size_t u = 0; u < 3; ++u)
        for (const Moment moment : kMoments)
          for (int64_t at = 0; at < parts[u].count; at += 9) {  // in pieces
            std::vector<float> values;
            for (int64_t i = at; i < std::min(at + 9, parts[u].count); ++i) values.push_back(value(u, moment, parts[u].begin + i, step));
            writer.append(values.data(), static_cast<int64_t>(values.size()));
          }
      files.push_back(writer.finish());
    }
    publish_state(incomplete, folder, {{"step", step}, {"model", model(100)}}, files);
    return folder;
  }

  static Json model(int64_t elements) { return {{"architecture", "Llama"}, {"units", {{{"name", "unit0"}, {"elements", elements}}}}}; }

  void expect_whole(const std::string& folder, int64_t step, int64_t world) {
    for (int64_t rank = 0; rank < world; ++rank) {
      StateReader reader(folder);
      for (size_t u = 0; u < 3; ++u) {
        const int64_t n = ceil_div(kElements[u], world), begin = std::min(rank * n, kElements[u]), count = std::min(n, kElements[u] - begin);
        for (const Moment moment : kMoments) {
          std::vector<float> got(static_cast<size_t>(count), -1);
          reader.read(name(u), moment, begin, count, got.data());
          for (int64_t i = 0; i < count; ++i) ASSERT_EQ(got[static_cast<size_t>(i)], value(u, moment, begin + i, step));
        }
      }
    }
  }

  // Reads all; the sentence of what is damaged, "" where nothing is.
  std::string damage(const std::string& folder) {
    try {
      StateReader reader(folder);
      for (size_t u = 0; u < 3; ++u)
        for (const Moment moment : kMoments) {
          std::vector<float> got(static_cast<size_t>(kElements[u]));
          reader.read(name(u), moment, 0, kElements[u], got.data());
        }
    } catch (const DamagedState& e) {
      const std::string said = e.what();
      return said.starts_with(folder) ? said.substr(folder.size()) : said;
    }
    return "";
  }

  fs::path folder_;
};

TEST_F(State, IsReadByAnyNumberOfRanks) {
  for (const int64_t written : {1, 2, 4, 11})
    for (const int64_t read : {1, 2, 3, 8}) expect_whole(save(written * 10 + read, written), written * 10 + read, read);
}

TEST_F(State, EveryFlippedByteAndMissingFileIsSeen) {
  const std::string folder = save(5, 2);
  ASSERT_EQ(damage(folder), "");
  for (const auto& entry : std::vector<fs::directory_entry>(fs::directory_iterator(folder), {})) {
    const int64_t size = static_cast<int64_t>(fs::file_size(entry.path()));
    for (int64_t at = 0; at < size; at += 13) {
      std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
      file.seekg(at);
      const char before = static_cast<char>(file.get());
      if (before == ' ') continue;  // between what the header of a file says
      file.seekp(at);
      file.put(static_cast<char>(before ^ 1));
      file.close();
      EXPECT_NE(damage(folder), "") << entry.path() << " byte " << at;
      std::fstream(entry.path(), std::ios::in | std::ios::out | std::ios::binary).seekp(at).put(before);
    }
    ASSERT_EQ(damage(folder), "");
    fs::rename(entry.path(), folder_ / "away");
    EXPECT_NE(damage(folder), "") << entry.path();
    std::ofstream(entry.path()) << "short";
    EXPECT_NE(damage(folder), "") << entry.path();
    fs::rename(folder_ / "away", entry.path());
  }
}

TEST_F(State, TheLatestComesFirstAndOldOnesGo) {
  EXPECT_TRUE(find_states((folder_ / "none").string()).empty());
  for (const int64_t step : {10, 30, 20}) save(step, 1);
  const auto names = [&] {
    std::vector<std::string> all;
    for (const std::string& folder : find_states(folder_.string())) all.push_back(fs::path(folder).filename().string().substr(12));
    return all;
  };
  EXPECT_EQ(names(), (std::vector<std::string>{"20", "30", "10"}));  // saved last, then by step
  fs::create_directories(folder_ / "global_step_40.incomplete");
  fs::create_directories(folder_ / "global_step_50");  // no manifest: not ours to remove
  prune_states(folder_.string(), 0);
  EXPECT_EQ(names(), (std::vector<std::string>{"20", "30", "10"}));
  EXPECT_FALSE(fs::exists(folder_ / "global_step_40.incomplete"));
  prune_states(folder_.string(), 2);
  EXPECT_EQ(names(), (std::vector<std::string>{"20", "30"}));
  EXPECT_TRUE(fs::exists(folder_ / "global_step_50"));
  save(20, 2);  // again, by a run that went on from before it
  expect_whole((folder_ / "global_step_20").string(), 20, 1);
  EXPECT_THROW(check_state_target(folder_.string()), UserError);
}

TEST_F(State, OfAnotherModelIsRefused) {
  StateReader reader(save(1, 1));
  EXPECT_NO_THROW(reader.check_model(model(100)));
  try {
    reader.check_model(model(128));
    FAIL();
  } catch (const UserError& e) {
    EXPECT_TRUE(std::string(e.what()).ends_with("the state is of another model: unit0 has 100 elements there, unit0 128 in the recipe's")) << e.what();
  }
}

TEST_F(State, AManifestThatNobodyWroteIsDamaged) {
  const fs::path state = folder_ / "global_step_1";
  fs::create_directories(state);
  for (const std::string& text : {std::string("{"), std::string("[]"), "{\"a\":" + std::string(300000, '[') + std::string(300000, ']') + "}"}) {
    std::ofstream(state / "manifest.json") << text;
    EXPECT_THROW(StateReader(state.string()), DamagedState);
  }
  const std::string named = (folder_ / "global_step_2").string();
  make_folder(incomplete_name(named));
  publish_state(incomplete_name(named), named, {{"model", "none"}}, {});
  EXPECT_THROW(StateReader(named).check_model({{"architecture", "A"}, {"units", Json::array()}}), DamagedState);
}

TEST_F(State, AFullDiskLeavesNoFile) {
  try {
    StateWriter("/dev", 0, {{"u", 0, int64_t{1} << 46}});
    FAIL();
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("no room on disk"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace uly::checkpoint
