// The search for what is kept where, and what the plan says of it: over models, ranks, lengths and rooms.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <regex>
#include <set>

#include "base/check.h"
#include "plan/choose.h"
#include "plan/longest.h"
#include "plan/plan.h"
#include "plan/reasons.h"
#include "plan/timeline.h"

namespace uly::plan {
namespace {

using ops::Tier;

constexpr int64_t kGiB = int64_t{1} << 30;

models::Spec llama_8b() {
  models::Spec s;
  s.name = "8b", s.D = 4096, s.F = 14336, s.N = 32, s.K = 8, s.H = 128, s.V = 128256, s.L = 32, s.max_positions = 131072;
  return s;
}
models::Spec qwen_32b() {
  models::Spec s;
  s.name = "32b", s.D = 5120, s.F = 25600, s.N = 64, s.K = 8, s.H = 128, s.V = 151936, s.L = 64, s.qk_norm = true, s.max_positions = 40960;
  return s;
}
models::Spec llama_70b() {
  models::Spec s;
  s.name = "70b", s.D = 8192, s.F = 28672, s.N = 64, s.K = 8, s.H = 128, s.V = 128256, s.L = 80, s.max_positions = 131072;
  return s;
}

// One node with P GPUs; memory in GiB, of a GPU, of the host, and on its disk.
Machine node(int64_t P, int64_t gpu, int64_t host, int64_t disk) {
  Machine m;
  m.cuda = m.imagined = true, m.gpus = P, m.gpu_major = 9, m.gpu_name = "H200", m.gpu_free_bytes = gpu * kGiB, m.memory_bytes = host * kGiB, m.disk_bytes = disk * kGiB, m.cores = 16 * P;
  return m;
}

recipe::Recipe recipe_for(int64_t P, int64_t max_length) {
  recipe::Recipe r;
  r.path = "run.yml", r.model.dtype = Dtype::kBf16, r.sequence_parallel_size = P, r.data.max_length = max_length;
  return r;
}

Plan chosen(const models::Spec& spec, int64_t P, const Machine& machine, int64_t length) {
  const recipe::Recipe r = recipe_for(P, length);
  Plan plan = sized(r, spec, machine, P, length);
  choose_kept(step::Model(spec), plan, question(plan, r, machine));
  return plan;
}

Plan made(const models::Spec& spec, int64_t P, const Machine& machine, int64_t length, const Asked& asked = {}) { return make(recipe_for(P, length), spec, machine, P, std::nullopt, asked); }

struct Case {
  models::Spec spec;
  int64_t P, gpu, host, disk;
};
std::vector<Case> cases() {
  return {{llama_8b(), 1, 80, 60, 0}, {llama_8b(), 1, 140, 125, 60}, {llama_8b(), 3, 140, 300, 0}, {llama_8b(), 8, 80, 1900, 0}, {qwen_32b(), 1, 140, 700, 0}, {qwen_32b(), 8, 80, 1000, 4000}, {llama_70b(), 8, 140, 1900, 0}, {llama_70b(), 64, 80, 1900, 0}};
}

// What the chosen takes never is more than there is, in any tier; a longer sequence takes longer; and what does not fit does not fit
// when it is longer.
TEST(SearchTest, StaysWithinEveryRoomAtAnyLength) {
  for (const Case& c : cases()) {
    double seconds = 0;
    bool fits = true;
    for (int64_t length = 32768; length <= int64_t{1} << 23; length *= 4) {
      const Plan p = chosen(c.spec, c.P, node(c.P, c.gpu, c.host, c.disk), length);
      SCOPED_TRACE(fmt::format("{} P {} gpu {} host {} disk {} length {}", c.spec.name, c.P, c.gpu, c.host, c.disk, length));
      EXPECT_LE(p.pricings, 3000);
      EXPECT_TRUE(fits || !p.fits);
      fits = p.fits;
      if (!fits) continue;
      EXPECT_LE(total_bytes(p), p.room.device_bytes);
      for (const Tier tier : {Tier::kHost, Tier::kDisk}) EXPECT_LE(p.price.total_bytes(tier), p.room.of(tier));
      EXPECT_GT(p.seconds, seconds);
      seconds = p.seconds;
      // All programs that the engine runs lie within the arenas of the one that was priced.
      const step::Model model(c.spec);
      for (const bool update : {false, true}) {
        if (update && !p.options.defers_updates()) continue;
        const Price price = price_micro_step(model, p.options, {.update = update});
        for (const Tier tier : {Tier::kDevice, Tier::kHost, Tier::kDisk}) EXPECT_LE(price.step_places.of(tier), p.price.step_places.of(tier) + p.price.step_places.of(tier) / 200);
      }
    }
  }
}

TEST(SearchTest, MoreRoomIsNeverSlower) {
  struct Rooms {
    int64_t P, length;
    std::vector<std::array<int64_t, 3>> of;  // gpu, host, disk
  };
  const std::vector<Rooms> all = {{1, 65536, {{60, 125, 0}, {70, 125, 0}, {80, 125, 0}, {96, 125, 0}, {120, 125, 0}, {140, 125, 0}, {180, 125, 0}, {288, 125, 0}}},
                                  {1, 262144, {{80, 110, 0}, {80, 125, 0}, {80, 150, 0}, {80, 200, 0}, {80, 400, 0}, {80, 1900, 0}}},
                                  {1, 393216, {{140, 125, 0}, {140, 125, 30}, {140, 125, 60}, {140, 125, 120}, {140, 125, 500}, {140, 150, 500}, {180, 150, 500}}},
                                  {4, 524288, {{40, 200, 0}, {48, 200, 0}, {60, 300, 0}, {80, 400, 0}, {140, 400, 0}, {140, 400, 1000}}}};
  for (const Rooms& rooms : all) {
    double seconds = 1e30;
    bool fitted = false;
    for (const auto& [gpu, host, disk] : rooms.of) {
      const Plan p = chosen(llama_8b(), rooms.P, node(rooms.P, gpu, host, disk), rooms.length);
      SCOPED_TRACE(fmt::format("P {} length {} gpu {} host {} disk {}", rooms.P, rooms.length, gpu, host, disk));
      EXPECT_TRUE(p.fits || !fitted);
      if (!p.fits) continue;
      EXPECT_LE(p.seconds, 1.01 * seconds);
      seconds = p.seconds, fitted = true;
    }
    EXPECT_TRUE(fitted);
  }
}

// Rooms in which the first that is found does not fit with its places: what is found next is hardly slower.
TEST(SearchTest, GapsBetweenPlacesCostLittle) {
  struct Tight {
    models::Spec spec;
    int64_t P, length;
    double gpu, host, disk;  // GiB a rank
  };
  for (const Tight& t : std::vector<Tight>{{llama_8b(), 2, 1138688, 95.984853, 278.312042, 252.285884}, {llama_70b(), 16, 7290880, 127.255158, 265.163967, 0}, {qwen_32b(), 4, 1282048, 70.655824, 370.914683, 43.879286}}) {
    Machine machine = node(t.P, 0, 0, 0);
    machine.gpu_free_bytes = static_cast<int64_t>(t.gpu * static_cast<double>(kGiB)), machine.memory_bytes = static_cast<int64_t>(t.host * static_cast<double>(kGiB * t.P)), machine.disk_bytes = static_cast<int64_t>(t.disk * static_cast<double>(kGiB * t.P));
    const Plan here = chosen(t.spec, t.P, machine, t.length), longer = chosen(t.spec, t.P, machine, t.length / 100 * 103 / 1024 * 1024);
    ASSERT_TRUE(here.fits && longer.fits) << t.spec.name;
    EXPECT_LT(here.seconds, longer.seconds) << t.spec.name;
  }
}

// To cut the search short is to lose nothing.
TEST(SearchTest, IsAsGoodAsAThoroughOne) {
  for (const int64_t length : {65536, 262144, 524288}) {
    const Machine machine = node(1, 140, 125, 60);
    const recipe::Recipe r = recipe_for(1, length);
    const Plan quick = chosen(llama_8b(), 1, machine, length);
    Plan thorough = sized(r, llama_8b(), machine, 1, length);
    Question q = question(thorough, r, machine);
    q.thorough = true;
    choose_kept(step::Model(llama_8b()), thorough, q);
    EXPECT_NEAR(quick.seconds, thorough.seconds, 1e-3 * thorough.seconds) << length;
    EXPECT_EQ(thorough.considered.size(), 29u);
    double least = 1e30;
    for (const Candidate& c : thorough.considered)
      if (c.fits) least = std::min(least, c.seconds);
    EXPECT_LE(thorough.seconds, 1.002 * least);
  }
}

// What a layer with gate and up keeps takes longer to leave than the next layer computes: gate and up of every other one leave, and
// nothing is computed twice or waited for.
TEST(SearchTest, GateAndUpLeaveFromEveryOtherLayerWhereAllOfThemWouldBeWaitedFor) {
  const Machine machine = node(1, 139, 120, 0);
  const recipe::Recipe r = recipe_for(1, 65536);
  Plan plan = sized(r, llama_8b(), machine, 1, 65536);
  plan.options.optimizer = false;
  const step::Model model(llama_8b());
  choose_kept(model, plan, question(plan, r, machine));
  int64_t left = 0, stayed = 0;
  for (const step::LayerKeep& k : plan.options.keep) {
    EXPECT_GE(k.level, step::Keep::kGateUp);
    if (k.input_tier == Tier::kHost) ++(k.gate_up_tier == Tier::kHost ? left : stayed);
  }
  EXPECT_GT(left, 8);
  EXPECT_GE(stayed, left - 1);
  const auto seconds = [&](const step::Options& o) { return price_with_places(model, o, question(plan, r, machine).rates).seconds; };
  step::Options all = plan.options;
  for (step::LayerKeep& k : all.keep)
    if (k.input_tier == Tier::kHost) k.gate_up_tier = Tier::kHost;
  EXPECT_GT(seconds(all), 1.02 * seconds(plan.options));
}

TEST(SearchTest, RanksThatArePricedAsOneCostTheSame) {
  for (const auto& [N, K] : std::vector<std::pair<int64_t, int64_t>>{{28, 4}, {32, 8}, {64, 8}})
    for (const int64_t P : {3, 5, 8, 28}) {
      models::Spec spec = llama_8b();
      spec.N = N, spec.K = K, spec.L = 2;
      const Machine machine = node(P, 140, 500, 0);
      const recipe::Recipe r = recipe_for(P, 65536);
      Plan plan = sized(r, spec, machine, P, 65536);
      plan.options.keep.assign(2, {});
      const step::Model model(spec);
      std::set<std::pair<int64_t, int64_t>> priced, all;
      const auto cost = [&](const step::Options& o) {
        const Priced p = read_step(model, o, preset_rates("H200", 16));
        return std::pair(p.so_far().of(Tier::kDevice).peak_bytes, std::llround(1e9 * p.so_far().busy[0]));
      };
      for (const step::Options& o : unlike_ranks(spec, plan.options)) priced.insert(cost(o));
      for (int64_t rank = 0; rank < P; ++rank) all.insert(cost(options_for(plan, rank, plan.planned_length)));
      EXPECT_EQ(priced, all) << N << ":" << K << " on " << P;
    }
}

TEST(LongestTest, FitsAndTwoPercentMoreDoesNot) {
  for (const Case& c : cases()) {
    const Machine machine = node(c.P, c.gpu, c.host, c.disk);
    SCOPED_TRACE(fmt::format("{} P {} gpu {} host {} disk {}", c.spec.name, c.P, c.gpu, c.host, c.disk));
    const Plan p = made(c.spec, c.P, machine, recipe::kAutoLength, {.longest = true});
    ASSERT_TRUE(p.longest);
    if (p.longest->max_length == 0) {
      EXPECT_FALSE(p.fits);
      continue;
    }
    EXPECT_TRUE(p.fits);
    EXPECT_EQ(p.max_length, p.longest->max_length);
    EXPECT_EQ(p.max_length % (c.P * 256), 0);
    EXPECT_LE(p.longest->pricings, 2000);
    EXPECT_FALSE(chosen(c.spec, c.P, machine, p.max_length + std::max<int64_t>(256 * c.P, p.max_length / 50)).fits);
    ASSERT_TRUE(p.longest->limit);
    EXPECT_GT(p.longest->next_length, p.max_length);
    // A device's room as a plan may use it: a part of it stays free.
    EXPECT_GT(static_cast<double>(p.longest->bytes), 0.99 * static_cast<double>(p.longest->room_bytes));
    EXPECT_LT(static_cast<double>(p.longest->bytes), 1.2 * static_cast<double>(p.longest->room_bytes));
  }
}

TEST(LongestTest, GrowsWithEveryRoom) {
  int64_t last = 0;
  for (const auto& [gpu, host, disk] : std::vector<std::array<int64_t, 3>>{{60, 125, 0}, {80, 125, 0}, {140, 125, 0}, {140, 200, 0}, {140, 200, 100}, {140, 200, 1000}, {180, 200, 1000}}) {
    const int64_t longest = find_longest(recipe_for(1, 32768), llama_8b(), node(1, gpu, host, disk), 1, kLongestAsked, 256, 32768).max_length;
    EXPECT_GE(static_cast<double>(longest), 0.99 * static_cast<double>(last)) << gpu << " " << host << " " << disk;
    last = longest;
  }
  EXPECT_GT(last, 1500000);
}

TEST(LongestTest, SaysWhatLimitsIt) {
  const auto limit = [](int64_t gpu, int64_t host, int64_t disk) { return find_longest(recipe_for(1, 32768), llama_8b(), node(1, gpu, host, disk), 1, kLongestAsked, 256, 32768); };
  EXPECT_EQ(limit(140, 125, 0).limit, Tier::kHost);
  EXPECT_EQ(limit(60, 1900, 0).limit, Tier::kDevice);
  EXPECT_EQ(limit(140, 125, 60).limit, Tier::kDisk);
  models::Spec sliding = llama_8b();
  sliding.sliding_window = 4096;
  const Longest windowed = find_longest(recipe_for(1, 4096), sliding, node(1, 140, 125, 0), 1, kLongestAsked, 256, 4096);
  EXPECT_EQ(windowed.max_length, 4096);
  EXPECT_FALSE(windowed.limit);
}

TEST(LongestTest, AutoNeedsToKnowTheMemory) {
  Machine unknown = node(1, 0, 0, 0);
  try {
    made(llama_8b(), 1, unknown, recipe::kAutoLength);
    FAIL();
  } catch (const UserError& e) {
    EXPECT_STREQ(e.what(), "data.max_length (run.yml): auto needs to know how much memory there is: give it with memory.device, or a length");
  }
  EXPECT_FALSE(made(llama_8b(), 1, unknown, 32768, {.longest = true}).longest);
}

// Every way out that the sentence names is one.
void expect_ways_out(const models::Spec& spec, int64_t P, const Machine& machine, int64_t length, const std::string& why_not) {
  const auto value = [&](const std::string& key) -> std::optional<int64_t> {
    std::smatch found;
    if (!std::regex_search(why_not, found, std::regex(key + "=([0-9]+)"))) return {};
    return std::stoll(found[1]);
  };
  if (const auto shorter = value("data.max_length")) {
    EXPECT_TRUE(made(spec, P, machine, *shorter).fits) << why_not;
  }
  if (const auto gib = value("memory.disk_size")) {
    Machine with = machine;
    with.disk_bytes = *gib * kGiB;
    EXPECT_TRUE(made(spec, P, with, length).fits) << why_not;
  }
  if (const auto ranks = value("sequence_parallel_size")) {
    EXPECT_TRUE(made(spec, *ranks, machine, length).fits) << why_not;
  }
  std::smatch disk;
  if (std::regex_search(why_not, disk, std::regex("memory.disk, ([0-9.]+) GiB of it"))) {
    Machine with = machine;
    with.disk_bytes = static_cast<int64_t>(1.02 * std::stod(disk[1]) * static_cast<double>(kGiB));
    EXPECT_TRUE(made(spec, P, with, length).fits) << why_not;
  }
}

TEST(WhyNotTest, NamesTheTierThatIsShortAndWhatToDo) {
  struct Short {
    int64_t gpu, host, disk, length;
    const char* begins;
    const char* has;
  };
  for (const Short& s : std::vector<Short>{{40, 1900, 0, 2000000, "needs ", "on each GPU, 40.0 GiB free, 39.6 GiB of it for a plan: "},
                                           {140, 60, 0, 600000, "host memory: needs ", "are optimizer states; keep them on a disk with memory.disk"},
                                           {140, 125, 60, 1500000, "disk: needs ", "a folder on a larger disk in memory.disk"}}) {
    const Machine machine = node(1, s.gpu, s.host, s.disk);
    const Plan p = made(llama_8b(), 1, machine, s.length);
    ASSERT_FALSE(p.fits);
    EXPECT_TRUE(p.why_not.starts_with(s.begins)) << p.why_not;
    EXPECT_NE(p.why_not.find(s.has), std::string::npos) << p.why_not;
    EXPECT_NE(p.why_not.find("data.max_length="), std::string::npos) << p.why_not;
    expect_ways_out(llama_8b(), 1, machine, s.length, p.why_not);
  }
}

// On the CPU device and host are the same memory, shared by its ranks; what is asked for beyond it is not there.
TEST(RoomTest, NoMoreIsBelievedThanIsFree) {
  Machine cpu = node(2, 0, 24, 0), gpu = node(1, 80, 64, 60);
  cpu.cuda = false;
  struct Case {
    int64_t device, host, device_room, host_room;
  };
  for (const Case& c : std::vector<Case>{{0, 0, 12, 0}, {20, 100, 12, 0}, {8, 100, 8, 4}, {8, 6, 8, 3}, {0, 8, 8, 4}, {0, 100, 6, 6}}) {
    recipe::Recipe r = recipe_for(2, 4096);
    r.memory_device_bytes = c.device * kGiB, r.memory_host_bytes = c.host * kGiB;
    const Plan p = make(r, llama_8b(), cpu, 2, std::nullopt);
    EXPECT_EQ(p.room.device_bytes, c.device_room * kGiB) << c.device << " " << c.host;
    EXPECT_EQ(p.room.host_bytes, c.host_room * kGiB) << c.device << " " << c.host;
  }
  recipe::Recipe r = recipe_for(1, 4096);
  r.memory_device_bytes = 200 * kGiB, r.memory_host_bytes = 300 * kGiB, r.memory_disk_folders = {"/nowhere"}, r.memory_disk_bytes = 70 * kGiB;
  const Plan p = make(r, llama_8b(), gpu, 1, std::nullopt);
  EXPECT_EQ(p.room.device_bytes, 80 * kGiB);
  EXPECT_EQ(p.room.host_bytes, 64 * kGiB);
  EXPECT_EQ(p.room.disk_bytes, 60 * kGiB);
  for (const char* line : {"memory.device (", "200.0 GiB, of which 80.0 GiB are free here on each GPU", "300.0 GiB, of which 64.0 GiB are free here"}) EXPECT_NE(text(p).find(line), std::string::npos) << text(p);
}

TEST(RoomTest, AHundredthOfAGpuStaysFree) {
  for (const int64_t length : {60000, 131072, 262144}) {
    const Plan p = made(llama_8b(), 1, node(1, 80, 1900, 0), length);
    ASSERT_TRUE(p.fits);
    EXPECT_LE(static_cast<double>(total_bytes(p)), 0.99 * 80 * kGiB) << length;
  }
}

TEST(WhyNotTest, AsksForAsMuchAsItTakes) {
  const Machine machine = node(1, 140, 125, 0);
  recipe::Recipe r = recipe_for(1, 131072);
  r.memory_host_bytes = 20 * kGiB;
  const Plan p = make(r, llama_8b(), machine, 1, std::nullopt);
  ASSERT_FALSE(p.fits);
  std::smatch found;
  ASSERT_TRUE(std::regex_search(p.why_not, found, std::regex("memory.host=([0-9]+)GiB"))) << p.why_not;
  r.memory_host_bytes = std::stoll(found[1]) * kGiB;
  EXPECT_TRUE(make(r, llama_8b(), machine, 1, std::nullopt).fits);
  r.memory_host_bytes = r.memory_host_bytes / 100 * 95;
  EXPECT_FALSE(make(r, llama_8b(), machine, 1, std::nullopt).fits);
}

TEST(TimelineTest, IsRecordedOnlyWhereAskedAndAddsUp) {
  const Plan p = chosen(llama_8b(), 1, node(1, 140, 125, 0), 65536);
  const step::Model model(llama_8b());
  const Rates rates = preset_rates("H200", 16);
  EXPECT_TRUE(read_step(model, p.options, rates).so_far().marks.empty());
  const Price price = read_step(model, p.options, rates, true).price();
  for (size_t stream = 0; stream < price.busy.size(); ++stream) {
    double busy = 0, end = 0;
    for (const Price::Interval& i : price.intervals[stream]) {
      EXPECT_GE(i.begin, end);
      EXPECT_LE(i.end, price.seconds);
      busy += i.end - i.begin, end = i.end;
    }
    EXPECT_NEAR(busy, price.busy[stream], 1e-9 * price.seconds);
  }
  std::string names;
  double at = 0;
  for (const Part& part : parts_of(price)) {
    names += std::string(part.name) + " ";
    EXPECT_EQ(part.begin, at);
    at = part.end;
  }
  EXPECT_EQ(names, "forward loss backward update ");
  EXPECT_EQ(at, price.seconds);
  const std::vector<std::string> lines = timeline(price);
  ASSERT_EQ(lines.size(), 5u);  // the parts, compute, both ways, updates on the host
  EXPECT_NE(lines[0].find("|forward"), std::string::npos);
  EXPECT_NE(lines[0].find("|backward"), std::string::npos);
  EXPECT_TRUE(lines[1].starts_with("compute ")) << lines[1];
}

TEST(ReasonsTest, EveryChoiceHasASentenceFromPrices) {
  const Plan p = made(llama_8b(), 1, node(1, 140, 125, 60), 131072, {.explain = true});
  std::string said;
  for (const auto& sentence : p.facts["why"]) said += sentence.get<std::string>() + "\n";
  for (const char* part : {"not all states are on the device: ", "the device is ", "updates are made on the host: streamed through the device it takes ", "units stay on the device: ", "is away: with it on the device, the device is ", "go to computing again what is not kept"})
    EXPECT_NE(said.find(part), std::string::npos) << part << "\n" << said;
  int64_t chosen = 0;
  for (const auto& row : p.facts["considered"]) {
    chosen += row["chosen"].get<bool>();
    EXPECT_NE(row["fits"].get<bool>(), !row["short"].get<std::string>().empty()) << row.dump();
  }
  EXPECT_EQ(chosen, 1);
}

TEST(RatesTest, AnUnknownGpuIsSaidToBeTakenForAnH100) {
  Machine machine = node(1, 80, 500, 0);
  machine.gpu_name = "Tesla T1000";
  const Plan p = made(llama_8b(), 1, machine, 32768);
  EXPECT_NE(text(p).find("the rates of an H100 are assumed: nothing is known of Tesla T1000"), std::string::npos);
  machine.gpu_name = "H100";
  const Plan known = made(llama_8b(), 1, machine, 32768);
  EXPECT_EQ(text(known).find("are assumed"), std::string::npos);
  EXPECT_EQ(p.seconds, known.seconds);
}

}  // namespace
}  // namespace uly::plan
