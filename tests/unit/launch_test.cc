// Hostfiles, what is taken of them, and places that other launchers give.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>

#include "base/check.h"
#include "launch/environment.h"
#include "launch/exports.h"
#include "launch/hostfile.h"
#include "launch/nccl.h"

namespace uly::launch {
namespace {

std::string written(const std::string& text) {
  const std::string path = std::filesystem::temp_directory_path() / ("hostfile-" + std::to_string(::getpid()));
  std::ofstream(path) << text;
  return path;
}

std::vector<Host> read(const std::string& text) { return read_hostfile(written(text)); }

template <typename F>
std::string sentence(F&& f) {
  try {
    f();
  } catch (const UserError& e) {
    return e.what();
  }
  return "";
}

std::string refused(const std::string& text) {
  const std::string said = sentence([&] { read(text); }), path = written("");
  return said.starts_with(path) ? said.substr(path.size()) : said;
}

std::string words(const std::vector<Host>& hosts) {
  std::string text;
  for (const Host& h : hosts) {
    text += (text.empty() ? "" : " ") + h.name + ":";
    for (const int64_t slot : h.slots) text += std::to_string(slot);
  }
  return text;
}

TEST(Hostfile, TakesBothFormsCommentsAndBlanks) {
  EXPECT_EQ(words(read("# all\n\n  a slots=2 \r\nb: slots=3 # the big one\nuser@c.net\tslots=1 max_slots=4\n10.0.0.7 slots=1")), "a:01 b:012 user@c.net:0 10.0.0.7:0");
}

TEST(Hostfile, RefusesWhatItDoesNotKnow) {
  EXPECT_EQ(refused("a slots=2\nb\n"), ":2: expected `name slots=8`, found 'b'");
  EXPECT_EQ(refused("a slots=two"), ":1: expected `name slots=8`, found 'a slots=two'");
  EXPECT_EQ(refused("a  slots = 2"), ":1: expected `name slots=8`, found 'a  slots = 2'");
  EXPECT_EQ(refused("-oProxyCommand=x slots=2"), ":1: expected `name slots=8`, found '-oProxyCommand=x slots=2'");
  EXPECT_EQ(refused("a;reboot slots=2"), ":1: expected `name slots=8`, found 'a;reboot slots=2'");
  EXPECT_EQ(refused("a slots=0"), ":1: a: expected 1 to 1024 slots, found 0");
  EXPECT_EQ(refused("a slots=2\na: slots=4"), ":2: a was named before: expected a line a host");
  EXPECT_EQ(refused("# none\n"), ": expected lines like `name slots=8`, found none");
  EXPECT_EQ(sentence([] { read_hostfile("/no/such"); }), "--hostfile: /no/such cannot be read: No such file or directory");
}

TEST(Hostfile, IsCutByChoices) {
  const std::vector<Host> hosts = read("a slots=4\nb slots=4\nc slots=2\n");
  const auto chosen = [&](HostChoice c) { return words(choose_hosts(hosts, c)); };
  EXPECT_EQ(chosen({}), "a:0123 b:0123 c:01");
  EXPECT_EQ(chosen({.include = "b:2,0,2@a"}), "a:0123 b:02");
  EXPECT_EQ(chosen({.exclude = "a@b:1,3"}), "b:02 c:01");
  EXPECT_EQ(chosen({.exclude = "c:0,1"}), "a:0123 b:0123");
  EXPECT_EQ(chosen({.num_nodes = 2, .num_gpus = 3}), "a:012 b:012");
  const auto said = [&](HostChoice c) { return sentence([&] { choose_hosts(hosts, c); }); };
  EXPECT_EQ(said({.include = "d"}), "--include: expected hosts of the hostfile, as in host:0,2@other, found 'd'");
  EXPECT_EQ(said({.exclude = "c:2"}), "--exclude: c: expected slots 0 to 1, found '2'");
  EXPECT_EQ(said({.include = "c:x"}), "--include: c: expected slots 0 to 1, found 'x'");
  EXPECT_EQ(said({.include = "a", .exclude = "b"}), "--include and --exclude: expected one of them, found both");
  EXPECT_EQ(said({.include = "a", .num_gpus = 1}), "--include: expected neither --num_nodes nor --num_gpus besides");
  EXPECT_EQ(said({.num_nodes = 4}), "--num_nodes: expected at most 3, the hosts there are, found 4");
  EXPECT_EQ(said({.num_gpus = 3}), "--num_gpus: expected at most 2, the slots of c, found 3");
  EXPECT_EQ(said({.exclude = "a@b@c"}), "--exclude: expected to leave a slot, found 'a@b@c'");
}

TEST(Hostfile, IsCutByNamesWithAnAtOrAColonInThem) {
  const std::vector<Host> hosts = read("me@a slots=2\na slots=2\n[fe80::1] slots=2\nme slots=1\n");
  const auto chosen = [&](const std::string& include) { return words(choose_hosts(hosts, {.include = include})); };
  EXPECT_EQ(chosen("me@a:0"), "me@a:0");
  EXPECT_EQ(chosen("a:1@me@a"), "me@a:01 a:1");
  EXPECT_EQ(chosen("[fe80::1]:1@me"), "[fe80::1]:1 me:0");
  EXPECT_EQ(sentence([&] { chosen("me@b:0"); }), "--include: expected hosts of the hostfile, as in host:0,2@other, found 'b'");
  EXPECT_EQ(sentence([&] { chosen("a@"); }), "--include: expected hosts of the hostfile, as in host:0,2@other, found ''");
}

TEST(Hostfile, KnowsThisMachine) {
  EXPECT_TRUE(is_this_machine("localhost"));
  EXPECT_TRUE(is_this_machine("root@127.0.0.1"));
  EXPECT_FALSE(is_this_machine("no-such-machine"));
  EXPECT_FALSE(is_this_machine("203.0.113.7"));
}

// Sets variables for one test.
class Environment : public testing::Test {
 protected:
  void set(const std::string& name, const std::string& value) {
    if (!before_.contains(name)) before_[name] = variable(name);
    ::setenv(name.c_str(), value.c_str(), 1);
  }
  void unset(const std::string& name) {
    if (!before_.contains(name)) before_[name] = variable(name);
    ::unsetenv(name.c_str());
  }
  void SetUp() override {
    for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) unset(name);
  }
  void TearDown() override {
    for (const auto& [name, value] : before_) value ? ::setenv(name.c_str(), value->c_str(), 1) : ::unsetenv(name.c_str());
  }

 private:
  std::map<std::string, std::optional<std::string>> before_;
};

TEST_F(Environment, OfSrun) {
  for (const auto& [name, value] : std::map<std::string, std::string>{{"SLURM_STEP_ID", "0"}, {"SLURM_JOB_ID", "17"}, {"SLURM_PROCID", "5"}, {"SLURM_STEP_NUM_TASKS", "7"}, {"SLURM_LOCALID", "1"}, {"SLURM_NODEID", "2"}, {"SLURM_STEP_TASKS_PER_NODE", "2(x2),3"}, {"SLURM_STEP_NODELIST", "gpu[07-09]"}}) set(name, value);
  const std::optional<Place> place = place_in_job();
  ASSERT_TRUE(place);
  EXPECT_EQ(place->rank, 5);
  EXPECT_EQ(place->world_size, 7);
  EXPECT_EQ(place->local_rank, 1);
  EXPECT_EQ(place->local_world_size, 3);
  EXPECT_EQ(place->master_address, "gpu07");
  EXPECT_GE(place->master_port, 20000);
  set("SLURM_PROCID", "7");
  EXPECT_EQ(sentence([] { place_in_job(); }), "environment variable SLURM_PROCID: expected a whole number from 0 to 6, found '7'");
  unset("SLURM_STEP_ID");  // the batch script itself
  EXPECT_FALSE(place_in_job());
}

TEST_F(Environment, FirstHostOfSlurmsLists) {
  EXPECT_EQ(first_of_hosts("n[01-03,7]-x,other"), "n01-x");
  EXPECT_EQ(first_of_hosts("n[2,5]"), "n2");
  EXPECT_EQ(first_of_hosts("a,b[1-2]"), "a");
  EXPECT_EQ(first_of_hosts("single"), "single");
}

TEST_F(Environment, OfMpirun) {
  for (const auto& [name, value] : std::map<std::string, std::string>{{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}}) set(name, value);
  ASSERT_TRUE(place_in_job());
  EXPECT_EQ(place_in_job()->master_address, "127.0.0.1");
  set("OMPI_COMM_WORLD_LOCAL_SIZE", "2");
  EXPECT_EQ(sentence([] { place_in_job(); }), "environment variable MASTER_ADDR: expected the first machine's address, as ranks are on several (OMPI_COMM_WORLD_SIZE): mpirun -x MASTER_ADDR=HOST");
  set("MASTER_ADDR", "head");
  EXPECT_EQ(place_in_job()->master_address, "head");
}

TEST_F(Environment, IsExportedWithItsFiles) {
  const std::filesystem::path folder = std::filesystem::temp_directory_path() / ("exports-" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  set("DS_ENV_FILE", folder / "env");
  set("NCCL_DEBUG", "INFO");
  set("OF_NO_INTEREST", "x");
  std::ofstream(folder / "env") << "\n# comment\n  NCCL_DEBUG=WARN\nA=1=2 'x'\r\n";
  std::map<std::string, std::string> found;
  for (const auto& [name, value] : exported_variables()) found[name] = value;
  EXPECT_EQ(found["NCCL_DEBUG"], "WARN");
  EXPECT_EQ(found["A"], "1=2 'x'");
  EXPECT_FALSE(found.contains("OF_NO_INTEREST"));
  std::ofstream(folder / "env") << "\nsecret word\n";
  EXPECT_EQ(sentence([] { exported_variables(); }), (folder / "env").string() + ":2: expected KEY=VALUE, a blank line or a comment");
  std::filesystem::remove_all(folder);
}

TEST(Utf8, IsKnown) {
  for (const char* text : {"", "abc", "gr\xc3\xb6\xc3\x9f" "er", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xed\x9f\xbf"}) EXPECT_TRUE(is_utf8(text)) << text;
  for (const char* text : {"\xff", "\xc3", "a\x80", "\xc0\xaf", "\xe0\x80\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xf0\x9f\x98", "\xc3\x28"}) EXPECT_FALSE(is_utf8(text)) << text;
}

TEST(NcclTest, AFabricWithoutItsPluginIsSaid) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::path(testing::TempDir()) / fmt::format("infiniband-{}", ::getpid());
  fs::remove_all(folder);
  EXPECT_EQ(missing_plugin(folder.string()), "");
  for (const auto& [device, driver] : {std::pair("mlx5_0", "mlx5_core"), std::pair("rdmap16s27", "efa")}) {
    fs::create_directories(folder / device / "device");
    fs::create_symlink(fs::path("/sys/bus/pci/drivers") / driver, folder / device / "device" / "driver");
    const bool efa = std::string(driver) == "efa";
    EXPECT_EQ(missing_plugin(folder.string()).starts_with("rdmap16s27 is an EFA device, and NCCL finds no plugin for it (libnccl-net.so): "), efa);
  }
  ::setenv("NCCL_NET_PLUGIN", "libc.so.6", 1);  // any library that there is
  EXPECT_EQ(missing_plugin(folder.string()), "");
  ::unsetenv("NCCL_NET_PLUGIN");
  fs::remove_all(folder);
}

TEST(NcclTest, LittleSharedMemoryIsSaid) {
  EXPECT_EQ(little_shared_memory("/nowhere"), "");
  EXPECT_EQ(little_shared_memory("/proc"), "/proc has room for 0 B only; GPUs that exchange through it may need more (of a container: --shm-size)");
}

}  // namespace
}  // namespace uly::launch
