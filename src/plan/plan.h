// What will be done: a pure function of recipe, model and machine, the same on every rank, printable and hashed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/pack.h"
#include "data/token_file.h"
#include "models/spec.h"
#include "plan/choose.h"
#include "plan/measured.h"
#include "plan/price.h"
#include "recipe/recipe.h"
#include "step/decoder.h"

namespace uly::launch {
struct Gpu;
}

namespace uly::plan {

struct Machine {
  bool cuda = false;
  int64_t gpus = 0;           // visible
  int64_t cores = 1;
  int64_t memory_bytes = 0;   // what all local ranks may use together: obtainable memory of the host, or of the control group
  bool in_group = false;      // a control group leaves less than the host has
  int64_t local_ranks = 0;    // of the world, on this machine; 0: as many as it has GPUs for, on the CPU all
  int64_t disk_bytes = 0;     // for the scratch files of all local ranks; 0: what scratch_bytes() says here and now
  bool imagined = false;      // nothing of it is here
  std::string words;          // "2 cores, 23.0 GiB of memory free"
  std::string processor;      // "AMD EPYC 9R14"; "" where the system does not say
  std::optional<Measured> measured;  // on this machine, with this device
  std::string rates_words;    // where the rates come from, or why what was measured is not used

  // Of the GPUs that this machine's ranks use, where cuda: "", 0 where that is not known. Filled in by cli from launch.
  std::string gpu_name;
  int64_t gpu_total_bytes = 0, gpu_free_bytes = 0;  // of one GPU: the least that any has
  int gpu_major = 0, gpu_minor = 0;                 // the oldest's compute capability
  int64_t gpu_ranks = 1;                            // ranks on one GPU; above 1 only with ULYSSES_SHARE_GPU
  int64_t gpu_foreign_bytes = 0, gpu_foreign_pid = 0;  // on the GPU that has least free: what other processes hold, the largest of them
  int nccl_version = 0;                             // 22809 is 2.28.9; 0: it cannot be loaded, and why
  std::string nccl_why;
  std::string gpu_words;                            // "2 x NVIDIA H200, 139.8 GiB each"
  std::string gpu_foreign_words;                    // "GPU 0: 5.8 GiB belong to process 4411"; "" where they are ours alone
};

// Reads /proc and the control group; says nothing of what a GPU has. `gpus` comes from launch. `own_bytes`: of memory that is not free,
// what this machine's ranks hold already, which a plan counts as theirs.
Machine this_machine(bool cuda, int64_t gpus, int64_t own_bytes = 0);

// Fills in what the plan has to know of the GPUs that ranks will use, at least one: the least that any has. Returns the one
// that has least free.
const launch::Gpu& use_gpus(Machine& machine, std::span<const launch::Gpu> gpus);

// Takes the rates that were measured, once GPUs are known; `text`: of the file at `path`, nothing without one. Throws UserError where it
// is damaged.
void use_rates(Machine& machine, const std::optional<std::string>& text, const std::string& path);

// What preparing the data has found out; absent before.
struct DataFacts {
  std::string tokens_path;
  int64_t num_samples = 0, longest = 0, num_tokens = 0, num_trained_tokens = 0;
  std::string eval_tokens_path = {};  // of data.eval_sources
};

// The data of a plan: made once here, for who trains by it.
struct Packed {
  std::shared_ptr<const data::TokenFile> file;
  std::shared_ptr<const data::Packs> packs;
  int64_t padded_tokens = 0;  // of all packs, each padded as a micro-batch of its own

  explicit operator bool() const { return packs != nullptr; }
};

struct Line {
  std::string subject, text;  // "attention heads" -> "32:8, 4:1 a rank"
};

// The longest data.max_length that would fit, all else as it is, and what keeps it from more.
struct Longest {
  int64_t max_length = 0;            // 0: none fits
  std::optional<ops::Tier> limit;    // the tier that is too small for more; none: the model or the search goes no further
  int64_t next_length = 0;           // a length that does not fit
  int64_t bytes = 0, room_bytes = 0; // what that takes of the tier, and what there is
  ops::Kind kind = ops::Kind::kWeights;  // what it takes most for
  int64_t kind_bytes = 0;
  int64_t pricings = 0;
};

// What a plan is to say besides.
struct Asked {
  bool longest = false;       // the longest that fits
  bool explain = false;       // what else was considered, and why not
};

struct Plan {
  step::Mesh mesh;            // rank 0's place
  int64_t max_length = 0;     // tokens of the longest sample that is trained
  int64_t planned_length = 0; // tokens of the longest micro-batch that can occur, padded: what is priced
  step::Options options;      // for planned_length
  Price price;                // of the costliest rank
  int64_t besides_bytes = 0;  // of the device: this program, libraries and what they allocate, beside what the step's program has
  Room room;                  // for one rank; of the device 0 where the machine is not known
  int64_t micro_batches = 1;  // of a step
  double seconds = 0;         // of a step; 0 where no rates are known
  Rates rates;                // that seconds were found with
  std::string states_words;   // where states lie
  std::optional<Longest> longest;
  std::vector<Candidate> considered;
  int64_t pricings = 0;       // programs that were read
  bool fits = true;
  std::string why_not;        // a sentence, where it does not fit
  Packed train, eval;         // absent before the data is prepared
  double document_share = 1;  // ops::AttentionSchedule::document_share
  double eval_seconds = 0;    // of one of its micro-batches
  int64_t eval_bytes = 0;     // of the device, within a micro-batch of it
  int64_t num_samples = -1;   // of an epoch, or its packs; -1 before the data is prepared
  int64_t steps_per_epoch = -1, horizon = -1, num_steps = -1;
  std::vector<Line> lines;    // what a person reads, in order
  Json facts;                 // what `--json` prints
  std::string hash;           // of recipe, model and choices; equal on all ranks
};

// Throws UserError for what the recipe asks and cannot be.
Plan make(const recipe::Recipe& recipe, const models::Spec& spec, const Machine& machine, int64_t world, const std::optional<DataFacts>& data, const Asked& asked = {});

// Options for a micro-batch whose padded length is S, on the given rank, with the plan's choices.
step::Options options_for(const Plan& plan, int64_t rank, int64_t S);

// Fills options, price and whether it fits, for plan.mesh and plan.planned_length: what make() does at its heart.
void choose(Plan& plan, const recipe::Recipe& recipe, const models::Spec& spec, const Machine& machine, int64_t world);

// Prices a step of one rank, of one micro-batch; the programs that make up one; and an update that nothing follows.
Price price_step(const step::Model& model, const step::Options& options);
Price price_micro_step(const step::Model& model, const step::Options& options, const step::Phase& phase);
Price price_update(const step::Model& model, const step::Options& options);
Price price_evaluation(const step::Model& model, const step::Options& options, const Rates& rates = {});

// Columns of the widest matrix whose rows a kernel of the GPU sums: what its scratch is made for.
inline int64_t widest_summed_columns(const models::Spec& spec) { return std::max({spec.D, 2 * spec.F, spec.qkv_columns()}); }

// Bytes of a plan on one device, in all.
inline int64_t total_bytes(const Plan& p) { return p.price.total_bytes() + p.besides_bytes; }

// What is asked for where nothing else bounds a sequence: tokens.
inline constexpr int64_t kLongestAsked = int64_t{1} << 27;

// The longest data.max_length, up to what the recipe has, that fits into `budget_bytes` for one rank, all else as the plan has it; 0 if none does.
int64_t longest_that_fits(const recipe::Recipe& recipe, const models::Spec& spec, const Machine& machine, int64_t world, int64_t budget_bytes);

// Nine tenths of what memory.disk's folders have free that are used in turn: as much on each as on the fullest, and a disk's room
// once where several lie on it; and what all ranks of a machine may use there: as much, at most memory.disk_size. 0 without folders.
int64_t free_scratch_bytes(const recipe::Recipe& recipe);
int64_t scratch_bytes(const recipe::Recipe& recipe);

// Whether a folder is on a tmpfs: its files take host memory.
bool is_in_memory(const std::string& folder);

// Of `world` ranks, those on one machine.
int64_t ranks_on_machine(const Machine& machine, int64_t world);

// Padded length of a micro-batch of `tokens`: to div_length (or max_length) and to a multiple of P.
int64_t padded_length(const recipe::Recipe& recipe, int64_t max_length, int64_t P, int64_t tokens);

// Optimizer steps: how many an epoch has, how long the schedule is, how many this run makes.
struct Steps {
  int64_t per_epoch = 0, horizon = 0, run = 0, epochs = 0;
};
Steps count_steps(const recipe::Recipe& recipe, int64_t R, int64_t num_samples);

// The step after which a run ends that begins after `start` steps.
int64_t last_step(const recipe::Recipe& recipe, int64_t horizon, int64_t start);

std::string text(const Plan& plan);

}  // namespace uly::plan
