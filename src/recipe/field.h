// The format as data: one row a key. Reading, messages, defaults and docs/recipe.md all come from these rows.
#pragma once

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "base/json.h"
#include "recipe/recipe.h"

namespace uly::recipe {

enum class Decision {
  kWorks,
  kNoEffect,  // accepted; a note in the plan says why it changes nothing
  kLater,     // plan accepts, train refuses
  kRefused,
};

enum class Kind {
  kBool,
  kInt,       // an integer, or a text that is one
  kHumanInt,  // "1.5k", "2^20", ...
  kNumber,
  kHumanNumber,
  kText,
  kBytes,    // "80GiB"; the text is kept
  kNumbers,  // a list of `count` numbers
  kRanks,    // "*" or a list of integers
  kFree,     // a mapping that is handed on as it is
  kAny,
  kSection,   // a mapping with rows of its own
  kSections,  // a list of such mappings; one mapping alone is a list of one
};

// One accepted value of a key that takes few.
struct Choice {
  std::string value;
  Decision decision = Decision::kWorks;
  std::string why = {};    // of any decision but kWorks
  std::string means = {};  // the value it stands for; "": itself
};

using Set = std::function<void(Recipe&, const Json&)>;

struct Section;

struct Field {
  std::string name;
  std::string alias = {};
  Kind kind = Kind::kText;
  std::string initial = "null";  // the default, in YAML; kRequired: none
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
  double below = std::numeric_limits<double>::infinity();  // exclusive
  size_t count = 0;                                        // kNumbers: how many
  std::string word = {};                                   // taken too, in place of a number
  Decision decision = Decision::kWorks;                    // kLater and kRefused: of any value but the default
  std::string why = {};
  std::vector<Choice> choices = {};  // if a value is not among them, `decision` holds; kWorks then means: an error
  std::string doc;
  Set set = {};
  std::vector<Section> section;  // of kSection and kSections: one
};

inline constexpr const char* kRequired = "";

struct Section {
  std::string title;  // in the docs
  std::string doc;
  std::vector<Field> fields;
  std::string bare = {};  // a string in place of the mapping is this key's value
  bool open = false;      // a key without a row is noted, not refused, unless it looks like a typing error
  std::string open_why = {};
  std::function<void(Recipe&)> begin = {};  // before the keys are set
};

// The rows of a whole recipe file.
Section recipe_section();

// Its parts, each in a file of its own.
Section data_section();
Section deepspeed_section();
std::vector<Field> run_fields();
std::vector<Field> experiment_fields();

// Sets one member of the recipe, of one of its sections, or of the newest item of a list.
template <class T>
Set into(T Recipe::*member) {
  return [=](Recipe& r, const Json& v) { r.*member = v.get<T>(); };
}
template <class S, class T>
Set into(S Recipe::*section, T S::*member) {
  return [=](Recipe& r, const Json& v) { r.*section.*member = v.get<T>(); };
}
template <class S, class T>
Set into_newest(std::vector<S> Recipe::*list, T S::*member) {
  return [=](Recipe& r, const Json& v) { (r.*list).back().*member = v.get<T>(); };
}

}  // namespace uly::recipe
