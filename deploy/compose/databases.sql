-- Run by the postgres image when its volume is new. In production each cell has a server of its own.
CREATE DATABASE cellway_api;
CREATE DATABASE cell0;
CREATE DATABASE cell1;
CREATE DATABASE cell2;
