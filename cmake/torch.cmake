# LibTorch from the PyPI wheel in .venv. find_package(Torch) wants a CUDA toolkit on the system, so the targets are named
# by path here.
set(ULYSSES_VENV ${CMAKE_SOURCE_DIR}/.venv CACHE PATH "Python environment with torch")
file(GLOB TORCH_DIR ${ULYSSES_VENV}/lib/python3*/site-packages/torch)
if(NOT TORCH_DIR)
  message(FATAL_ERROR "no torch in ${ULYSSES_VENV}: run `make setup` first")
endif()
get_filename_component(SITE_PACKAGES ${TORCH_DIR} DIRECTORY)
set(CUDA_HOME_PYPI ${SITE_PACKAGES}/nvidia/cu13)

add_library(torch INTERFACE)
# After the system's own: the wheel carries a copy of fmt's headers that is not the library we link.
foreach(folder ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include ${CUDA_HOME_PYPI}/include ${SITE_PACKAGES}/nvidia/nccl/include)
  target_compile_options(torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-idirafter${folder}>)
endforeach()
target_compile_definitions(torch INTERFACE USE_DISTRIBUTED USE_C10D_GLOO AT_PER_OPERATOR_HEADERS)
set(torch_rpath_link "")
foreach(package cudnn nccl cusparselt nvshmem cu13)
  string(APPEND torch_rpath_link ":${SITE_PACKAGES}/nvidia/${package}/lib")
endforeach()
target_link_directories(torch INTERFACE ${TORCH_DIR}/lib)
target_link_options(torch INTERFACE -Wl,-rpath,${TORCH_DIR}/lib -Wl,-rpath-link,${TORCH_DIR}/lib${torch_rpath_link})
# at::parallel_for is a header: without OpenMP it would be one thread. The wheel brings the library.
target_compile_options(torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
target_link_libraries(torch INTERFACE torch_cpu c10 gomp)
