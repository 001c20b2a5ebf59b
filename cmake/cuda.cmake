# CUDA sources are compiled by nvcc from .venv through plain custom commands: CMake's own CUDA support wants a toolkit's
# layout. sm_80, sm_90a, sm_100, sm_120, and PTX for what comes after.
set(NVCC ${CUDA_HOME_PYPI}/bin/nvcc)
set(ULYSSES_CUDA_FLAGS -std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC --threads=2
    -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
    -gencode=arch=compute_100,code=sm_100 -gencode=arch=compute_120,code=[sm_120,compute_120])

# Compiles src/kernels/*.cu into `target` and links the CUDA runtime statically.
function(uly_cuda_kernels target)
  if(NOT ULYSSES_CUDA)
    return()
  endif()
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/kernels/*.cu)
  file(GLOB headers CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/kernels/*.h ${CMAKE_SOURCE_DIR}/src/kernels/device/*.cuh)
  foreach(source ${sources})
    get_filename_component(name ${source} NAME_WE)
    set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
    add_custom_command(OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/cuda
      COMMAND ${CCACHE} ${NVCC} ${ULYSSES_CUDA_FLAGS} -I${CMAKE_SOURCE_DIR}/src -c ${source} -o ${object}
      DEPENDS ${source} ${headers} COMMENT "nvcc ${name}.cu" VERBATIM)
    target_sources(${target} PRIVATE ${object})
    set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  endforeach()
  target_compile_definitions(${target} PUBLIC ULYSSES_CUDA)
  target_include_directories(${target} SYSTEM PUBLIC ${CUDA_HOME_PYPI}/include)
  target_link_libraries(${target} PUBLIC ${CUDA_HOME_PYPI}/lib/libcudart_static.a dl rt pthread)
endfunction()
